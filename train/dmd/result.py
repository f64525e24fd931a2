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


def write_student(
    folder: pathlib.Path,
    module: PyramidMMDiT,
    student: Any,
    adapter: tuple[ContextAdapter, Any],
    record: Mapping[str, Any],
) -> None:
    """Write one student.

    Args:
      student: its parameters on the host.
      adapter: the context adapter with its parameters.
      record: JSON for `student.json`.
    """
    checkpoint.save(folder / STUDENT, module, student)
    checkpoint.save(folder / STUDENT_ADAPTER, *adapter)
    with atomic_file(folder / 'student.json') as path:
        path.write_text(json.dumps(record, indent=2) + '\n')
