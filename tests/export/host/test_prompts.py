"""Calibration, validation and evaluation prompts: shipped lists, lists of the user, and their disjointness."""

from __future__ import annotations

import pathlib

import pytest

from export.host.prompts import (
    FEWEST_CALIBRATION_PROMPTS,
    FEWEST_EVALUATION_PROMPTS,
    FEWEST_VALIDATION_PROMPTS,
    choose_prompts,
)
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import shipped

# Captions whose ratios fell below the targets when calibration used only one caption.
REPORTED = [
    'a small green square moves left on a black background',
    'a small yellow triangle moves up on a blue background',
    'a small white circle moves down on a black background',
    'a small red square moves up on a black background',
    'a small green circle moves right on a blue background',
]


def write(path: pathlib.Path, *prompts: str) -> str:
    path.write_text('\n'.join(prompts) + '\n')
    return str(path)


@pytest.mark.parametrize('root', [shipped.find(None), pathlib.Path('/nowhere')])
def test_default_lists_are_long_and_disjoint(root):
    lists = choose_prompts(root, None, None, 8, 16)
    assert len(set(lists.calibration)) >= 3 * FEWEST_CALIBRATION_PROMPTS
    assert len(set(lists.validation)) == 8 >= FEWEST_VALIDATION_PROMPTS
    assert len(set(lists.evaluation)) == 16 >= FEWEST_EVALUATION_PROMPTS
    everything = [*lists.calibration, *lists.validation, *lists.evaluation]
    assert len(set(everything)) == len(everything)


def test_the_shipped_checkpoint_is_judged_on_the_reported_captions():
    assert choose_prompts(shipped.find(None), None, None, 8, FEWEST_EVALUATION_PROMPTS).evaluation[:5] == REPORTED


def test_evaluation_leaves_out_the_users_calibration_prompts(tmp_path):
    default = choose_prompts(tmp_path, None, None, 8, 8).evaluation
    given = write(tmp_path / 'given.txt', default[0].upper(), 'a  second   prompt')
    lists = choose_prompts(tmp_path, given, None, 1, 8)
    assert default[0].upper() in {*lists.calibration, *lists.validation} and default[0] not in lists.evaluation
    assert len(lists.evaluation) == 8


def test_a_prompt_in_both_lists_of_the_user_is_refused(tmp_path):
    one, other = write(tmp_path / 'one.txt', 'A  cat', 'a dog'), write(tmp_path / 'other.txt', 'a bird', 'a cat')
    with pytest.raises(InputError, match=r"other\.txt: 'a cat' is a calibration prompt, too"):
        choose_prompts(tmp_path, one, other, 1, 1)


def test_a_short_list_is_refused_and_no_prompt_recurs(tmp_path):
    short = write(tmp_path / 'short.txt', 'a bird', 'a fish')
    with pytest.raises(InputError, match=r'short\.txt: 2 prompts .* --evaluation-prompts is 3'):
        choose_prompts(tmp_path, None, short, 1, 3)
    assert choose_prompts(tmp_path, None, short, 1, 2).evaluation == ['a bird', 'a fish']


@pytest.mark.parametrize(('listed', 'asked', 'held_out'), [(2, 8, 1), (7, 8, 2), (12, 8, 4), (60, 8, 8), (60, 3, 3)])
def test_validation_holds_out_calibration_prompts(listed, asked, held_out, tmp_path):
    """Spread over the list, at most a third of it, and never also used for ranges."""
    prompts = [f'prompt {number}' for number in range(listed)]
    lists = choose_prompts(tmp_path, write(tmp_path / 'list.txt', *prompts), None, asked, 1)
    assert len(lists.validation) == held_out and not {*lists.validation} & {*lists.calibration}
    assert sorted([*lists.validation, *lists.calibration]) == sorted(prompts)


def test_one_calibration_prompt_is_refused(tmp_path):
    """Also if it is listed several times in other letter case."""
    with pytest.raises(InputError, match=r'list\.txt: one distinct calibration prompt\. List at least two'):
        choose_prompts(tmp_path, write(tmp_path / 'list.txt', 'A  cat', 'a cat'), None, 8, 1)
