"""The result of a distillation: students in the released layout, each with its adapter and `student.json`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.folders import STUDENT, STUDENT_ADAPTER
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.mmdit import PyramidMMDiT

# Subfolder of the result with the student without averaging.
NOT_AVERAGED = 'not_averaged'


def write_students(
    folder: pathlib.Path,
    module: PyramidMMDiT,
    students: Mapping[str, Any],
    adapter: tuple[ContextAdapter, Any],
    record: Mapping[str, Any],
) -> None:
    """Write the students of a distillation.

    Args:
      students: parameters on the host by subfolder; '' for the folder itself, whose student is the average where there
        is another one.
      adapter: the context adapter with its parameters.
      record: JSON for `student.json`, which also says whether a student is the average.
    """
    for name, student in students.items():
        place, averaged = folder / name, {'averaged': not name and len(students) > 1}
        checkpoint.save(place / STUDENT, module, student)
        checkpoint.save(place / STUDENT_ADAPTER, *adapter)
        with atomic_file(place / 'student.json') as path:
            path.write_text(json.dumps({**record, **averaged}, indent=2) + '\n')
