"""Disjoint calibration, validation and evaluation prompts from the user, the checkpoint, or the built-in lists.

Activation ranges are measured on calibration prompts. Quantization settings are chosen on validation prompts. Ratios
are reported on evaluation prompts.

A checkpoint that was trained on a different prompt distribution than the released system has
`calibration_prompts.txt` and `evaluation_prompts.txt` in its root folder.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from export.host.recording import spread
from neodragon_jax.base.errors import InputError
from neodragon_jax.evaluation.prompt_files import read_prompts

# Below these numbers the report warns that its ratios may not hold for other prompts.
FEWEST_CALIBRATION_PROMPTS = 12
FEWEST_VALIDATION_PROMPTS = 4
FEWEST_EVALUATION_PROMPTS = 8
_CALIBRATION, _EVALUATION = 'calibration_prompts.txt', 'evaluation_prompts.txt'
_BUILT_IN = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class PromptLists:
    """Distinct prompts, disjoint up to letter case and spaces.

    Attributes:
      calibration: for activation ranges.
      validation: for the choice of settings.
      evaluation: for the reported ratios.
    """

    calibration: Sequence[str]
    validation: Sequence[str]
    evaluation: Sequence[str]


def choose_prompts(
    checkpoint: pathlib.Path, calibration: str | None, evaluation: str | None, validated: int, count: int
) -> PromptLists:
    """Return the prompts of an export.

    Args:
      checkpoint: root folder; its lists, if present, are the defaults.
      calibration: file of the user's calibration prompts.
      evaluation: file of the user's evaluation prompts.
      validated: number of calibration prompts to hold out for validation; a list of fewer than three times as many
        gives a third of its prompts, at least one.
      count: number of evaluation prompts.
    Raises:
      InputError: a file has no prompts, the calibration prompts are all the same, the user's lists have a prompt in
        common, or fewer than `count` evaluation prompts remain after calibration prompts are excluded.
    """
    calibrated = _distinct(calibration or _default(checkpoint, _CALIBRATION))
    unseen = _unseen(calibrated, evaluation, _default(checkpoint, _EVALUATION), count)
    held_out = spread(calibrated, max(1, min(validated, len(calibrated) // 3)))
    return PromptLists([prompt for prompt in calibrated if prompt not in held_out], held_out, unseen)


def _distinct(listed: str | pathlib.Path) -> list[str]:
    """Return the distinct calibration prompts of a list, each as it is first written."""
    calibrated = list({_normal(prompt): prompt for prompt in reversed(read_prompts(listed))}.values())[::-1]
    if len(calibrated) < 2:
        raise InputError(
            f'{listed}: one distinct calibration prompt. List at least two: one of them is held out for validation.'
        )
    return calibrated


def _unseen(calibrated: Sequence[str], evaluation: str | None, default: pathlib.Path, count: int) -> list[str]:
    """Return the first evaluation prompts that calibration does not use; arguments as of `choose_prompts`."""
    seen = {_normal(prompt) for prompt in calibrated}
    source = evaluation or default
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
    return unseen[:count]


def _default(checkpoint: pathlib.Path, name: str) -> pathlib.Path:
    """Return the list of a checkpoint, or the built-in one."""
    path = checkpoint / name
    return path if path.is_file() else _BUILT_IN / name


def _normal(prompt: str) -> str:
    return ' '.join(prompt.casefold().split())
