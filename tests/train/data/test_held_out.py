"""Samples held out of a training."""

from __future__ import annotations

import pytest

from neodragon_jax.base.errors import InputError
from train.data.sources import hold_out, identity


def test_a_held_out_prompt_is_in_no_training_sample():
    source = Numbers(20)
    training, held_out = hold_out(source, 2, prompts=6)
    index_of = lambda part: [part[number]['index'] for number in range(len(part))]
    assert index_of(held_out) == [18, 19]
    assert index_of(training) == [index for index in range(18) if index % 6 not in (0, 1)]
    plain, _ = hold_out(source, 2)
    assert index_of(plain) == list(range(18))
    # One sample per prompt leaves nothing out; a prompt that nothing is left of is refused.
    assert len(hold_out(source, 2, prompts=20)[0]) == 18
    with pytest.raises(InputError, match=r'^config\.x, data: 6 samples are to be held out of 20 with 6 prompts'):
        hold_out(source, 6, prompts=6, setting='config.x, data')
    with pytest.raises(InputError, match=r'^x: 3 samples are to be held out of 2; hold out fewer, or add data'):
        hold_out(Numbers(2), 3, setting='x')
    assert len({identity(part) for part in (training, plain, held_out)}) == 3


def test_samples_that_are_lost_with_their_prompt_are_told(capsys):
    for prompts in (0, 512):  # no sample repeats a prompt
        assert len(hold_out(Numbers(512), 16, prompts)[0]) == 496 and not capsys.readouterr().out
    assert len(hold_out(Numbers(512), 16, 100, 'config.x, data')[0]) == 420
    assert capsys.readouterr().out == (
        'config.x, data: besides the 16 samples held out, 76 repeat their prompts; 420 of 512 remain to train on.\n'
    )


@pytest.mark.parametrize(('prompts', 'left'), [(20, 100), (17, 30), (16, 0)])
def test_most_samples_must_remain(prompts, left):
    message = rf'16 samples .* of 512 with {prompts} prompts, which leaves {left} of other .*samples of more prompts'
    with pytest.raises(InputError, match=message):
        hold_out(Numbers(512), 16, prompts)


class Numbers:
    """Samples that are their own index."""

    identity = 'numbers'

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /):
        return {'index': index}
