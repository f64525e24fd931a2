"""A distilled student: its folder, and its schedule in the record `student.json`, as `train.dmd` writes it.

    {"student_steps": [2, 2, 1], "student_first_steps": [2, 2, 2], "spacing": "even", "protocol": "21", ...}

A student is valid only at the levels that it was distilled at.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import is_there
from neodragon_jax.base.json_file import checked, read_json
from neodragon_jax.checkpoint import folders, hub, shipped
from neodragon_jax.checkpoint.results import find_result
from neodragon_jax.generation.defaults import GenerationDefaults, StepsPerStage
from neodragon_jax.pyramid.spacings import Spacing

FILE = 'student.json'
# Protocol of a student that generates all units but the first one (`train.dmd`).
FIRST_FRAME_GIVEN = '18'


@dataclasses.dataclass(frozen=True)
class _Levels:
    """The entries of the record that generation needs."""

    student_steps: StepsPerStage
    student_first_steps: StepsPerStage
    spacing: Spacing
    protocol: str = ''  # absent from older records


def find_student(given: str | os.PathLike[str], mode: str) -> pathlib.Path:
    """Return the folder of a student: RUN/result or RUN, local or in a bucket, or hf://ORG/NAME@REVISION.

    Raises:
      InputError: there is none, or the mode is that of the multi-step denoiser.
    """
    if mode != 'hybrid':
        raise InputError(f'--student is for hybrid mode, but the mode is {mode}; add --mode hybrid.')
    parts, option = (folders.STUDENT, folders.STUDENT_ADAPTER), '--student'
    if hub.is_explicit(os.fspath(given)):
        return shipped.find(given, parts, option)
    return find_result(given, parts, option)


def with_student(defaults: GenerationDefaults, folder: str | os.PathLike[str]) -> GenerationDefaults:
    """Return defaults whose hybrid mode has a student's schedule; without a record, return them unchanged.

    Args:
      folder: folder of the student.
    Raises:
      InputError: the record is damaged.
    """
    path = pathlib.Path(folder) / FILE
    if not is_there(path):
        return defaults
    record, names = read_json(path, dict[str, Any]), [field.name for field in dataclasses.fields(_Levels)]
    levels = checked({name: record[name] for name in names if name in record}, _Levels, str(path))
    hybrid = dataclasses.replace(
        defaults.hybrid,
        steps=levels.student_steps,
        first_steps=levels.student_first_steps,
        spacing=levels.spacing,
        given_first_frame=levels.protocol == FIRST_FRAME_GIVEN,
    )
    return dataclasses.replace(defaults, hybrid=hybrid)
