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
    assert len({identity(part) for part in (training, plain, held_out)}) == 3


class Numbers:
    """Samples that are their own index."""

    identity = 'numbers'

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /):
        return {'index': index}
