"""Calibration and evaluation prompts: shipped lists, lists of the user, and their disjointness."""

from __future__ import annotations

import pathlib

import pytest

from export.host.prompts import (
    FEWEST_CALIBRATION_PROMPTS,
    FEWEST_EVALUATION_PROMPTS,
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
    lists = choose_prompts(root, None, None, 16)
    assert len(set(lists.calibration)) >= 4 * FEWEST_CALIBRATION_PROMPTS
    assert len(set(lists.evaluation)) == 16 >= FEWEST_EVALUATION_PROMPTS
    assert not set(lists.calibration) & set(lists.evaluation)


def test_the_shipped_checkpoint_is_judged_on_the_reported_captions():
    assert choose_prompts(shipped.find(None), None, None, FEWEST_EVALUATION_PROMPTS).evaluation[:5] == REPORTED


def test_evaluation_leaves_out_the_users_calibration_prompts(tmp_path):
    default = choose_prompts(tmp_path, None, None, 8).evaluation
    given = write(tmp_path / 'given.txt', default[0].upper(), 'a  second   prompt')
    lists = choose_prompts(tmp_path, given, None, 8)
    assert lists.calibration[0] == default[0].upper() and default[0] not in lists.evaluation
    assert len(lists.evaluation) == 8


def test_a_prompt_in_both_lists_of_the_user_is_refused(tmp_path):
    one, other = write(tmp_path / 'one.txt', 'A  cat', 'a dog'), write(tmp_path / 'other.txt', 'a bird', 'a cat')
    with pytest.raises(InputError, match=r"other\.txt: 'a cat' is a calibration prompt, too"):
        choose_prompts(tmp_path, one, other, 1)


def test_a_short_list_is_refused_and_no_prompt_recurs(tmp_path):
    short = write(tmp_path / 'short.txt', 'a bird', 'a fish')
    with pytest.raises(InputError, match=r'short\.txt: 2 prompts .* --evaluation-prompts is 3'):
        choose_prompts(tmp_path, None, short, 3)
    assert choose_prompts(tmp_path, None, short, 2).evaluation == ['a bird', 'a fish']
