"""The schedule of a distilled student, from the record beside it: `student.json`, as `train.dmd` writes it.

    {"student_steps": [2, 2, 1], "student_first_steps": [2, 2, 2], "spacing": "even", ...}

A student is valid only at the levels that it was distilled at.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

from neodragon_jax.base.errors import InputError
from neodragon_jax.generation.defaults import STAGES, GenerationDefaults
from neodragon_jax.pyramid.spacings import SPACINGS

FILE = 'student.json'


def with_student(defaults: GenerationDefaults, folder: str | os.PathLike[str]) -> GenerationDefaults:
    """Return defaults whose hybrid mode has a student's schedule; without a record, return them unchanged.

    Args:
      folder: folder of the student.
    Raises:
      InputError: the record is damaged.
    """
    path = pathlib.Path(folder) / FILE
    if not path.exists():
        return defaults
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
        steps, first_steps = (tuple(record[name]) for name in ('student_steps', 'student_first_steps'))
        spacing = record['spacing']
        valid = all(isinstance(count, int) and count > 0 for count in (*steps, *first_steps))
        valid = valid and len(steps) == len(first_steps) == STAGES and spacing in SPACINGS
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path} is damaged ({error!r}); copy the student again.') from None
    if not valid:
        raise InputError(
            f'{path}: student_steps {list(steps)}, student_first_steps {list(first_steps)} and spacing {spacing!r} are '
            'no schedule; copy the student again.'
        )
    hybrid = dataclasses.replace(defaults.hybrid, steps=steps, first_steps=first_steps, spacing=spacing)
    return dataclasses.replace(defaults, hybrid=hybrid)
