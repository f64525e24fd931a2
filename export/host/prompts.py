"""Disjoint calibration and evaluation prompts from the user, the checkpoint, or the built-in lists.

A checkpoint that was trained on a different prompt distribution than the released system has
`calibration_prompts.txt` and `evaluation_prompts.txt` in its root folder.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from neodragon_jax.base.errors import InputError
from neodragon_jax.evaluation.prompt_files import read_prompts

# Below these numbers the report warns that its ratios may not hold for other prompts.
FEWEST_CALIBRATION_PROMPTS = 12
FEWEST_EVALUATION_PROMPTS = 8
_CALIBRATION, _EVALUATION = 'calibration_prompts.txt', 'evaluation_prompts.txt'
_BUILT_IN = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class PromptLists:
    """Distinct prompts for calibration and for evaluation, disjoint up to letter case and spaces."""

    calibration: Sequence[str]
    evaluation: Sequence[str]


def choose_prompts(
    checkpoint: pathlib.Path, calibration: str | None, evaluation: str | None, count: int
) -> PromptLists:
    """Return the prompts of an export.

    Args:
      checkpoint: root folder; its lists, if present, are the defaults.
      calibration: file of the user's calibration prompts.
      evaluation: file of the user's evaluation prompts.
      count: number of evaluation prompts.
    Raises:
      InputError: a file has no prompts, the user's lists have a prompt in common, or fewer than `count` evaluation
        prompts remain after calibration prompts are excluded.
    """
    calibrated = read_prompts(calibration or _default(checkpoint, _CALIBRATION))
    seen = {_normal(prompt) for prompt in calibrated}
    source = evaluation or _default(checkpoint, _EVALUATION)
    candidates = read_prompts(source, '--evaluation-prompts-file')
    unseen = [prompt for prompt in candidates if _normal(prompt) not in seen]
    if evaluation is not None and len(unseen) < len(candidates):
        common = next(prompt for prompt in candidates if _normal(prompt) in seen)
        raise InputError(f'{evaluation}: {common!r} is a calibration prompt, too. Remove it from one of the two lists.')
    if len(unseen) < count:
        raise InputError(
            f'{source}: {len(unseen)} prompts that calibration does not use, but --evaluation-prompts is {count}. '
            'Add prompts with --evaluation-prompts-file, or ask for fewer.'
        )
    return PromptLists(calibrated, unseen[:count])


def _default(checkpoint: pathlib.Path, name: str) -> pathlib.Path:
    """Return the list of a checkpoint, or the built-in one."""
    path = checkpoint / name
    return path if path.is_file() else _BUILT_IN / name


def _normal(prompt: str) -> str:
    return ' '.join(prompt.casefold().split())
