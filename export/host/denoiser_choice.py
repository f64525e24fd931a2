"""Choice of the denoiser to export: the checkpoint's, a distilled student, or a folder of the user."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.generation.defaults import GenerationDefaults
from neodragon_jax.generation.student import find_student, with_student


class DenoiserChoice(NamedTuple):
    """The folders of a denoiser and its context adapter (None: the mode's own), and defaults with its schedule."""

    denoiser: pathlib.Path
    adapter: pathlib.Path | None
    defaults: GenerationDefaults


def choose_denoiser(
    root: pathlib.Path,
    mode: str,
    defaults: GenerationDefaults,
    student: str | None,
    denoiser: pathlib.Path | None,
    adapter: pathlib.Path | None,
) -> DenoiserChoice:
    """Return the denoiser of a mode.

    Args:
      root: root folder of the checkpoint.
      defaults: of the checkpoint.
      student: folder or hub name of a student, with its context adapter and `student.json`.
      denoiser, adapter: component folders that replace the checkpoint's; a `student.json` beside the denoiser sets the
        schedule, because a student is valid only at the levels that it was distilled at.
    Raises:
      InputError: a student is combined with another denoiser, adapter or mode; or a folder is missing.
    """
    if student is None:
        if denoiser is None:
            found = checkpoint.component_folder(root, folders.DENOISER_FOLDERS[mode])
            return DenoiserChoice(found, adapter, defaults)
        return DenoiserChoice(denoiser, adapter, with_student(defaults, denoiser.parent))
    if denoiser is not None or adapter is not None:
        raise InputError('--student brings a denoiser and its context adapter; leave --denoiser and --adapter out.')
    folder = find_student(student, mode)
    parts = [checkpoint.component_folder(folder, name) for name in (folders.STUDENT, folders.STUDENT_ADAPTER)]
    return DenoiserChoice(parts[0], parts[1], with_student(defaults, folder))
