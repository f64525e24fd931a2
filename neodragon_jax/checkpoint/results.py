"""Results of training runs in place of a checkpoint's components: the folder RUN/result, or RUN itself."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import is_there
from neodragon_jax.base.paths import input_path
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.folders import TEACHER, TEACHER_ADAPTER

# Folder of the result in the folder of a run.
RESULT = 'result'


class DenoiserFolders(NamedTuple):
    """Component folders of a denoiser and of its context adapter."""

    denoiser: pathlib.Path
    adapter: pathlib.Path


def find_result(given: str | os.PathLike[str], components: Sequence[str], option: str) -> pathlib.Path:
    """Return the folder of a training result: the given one, or `result` in it.

    Args:
      components: folders of the result; only these and the files beside them, such as student.json, are copied from a
        bucket. The result must hold the first.
      option: the option that named the folder, for error messages.
    Raises:
      InputError: neither folder holds the first component.
    """
    parts = [*components, *(f'{RESULT}/{name}' for name in components)]
    component, folder = components[0], input_path(given, option, parts)
    for place in (folder, folder / RESULT):
        if is_there(place / component):
            return place
    what = f'no {component} in it or in its folder "{RESULT}"' if folder.is_dir() else 'no such folder'
    raise InputError(f'{option} {folder}: {what}. Give the folder of a finished training run, or RUN/{RESULT}.')


def find_teacher(root: str | os.PathLike[str], given: str | os.PathLike[str] | None, option: str) -> DenoiserFolders:
    """Return the multi-step denoiser of a checkpoint, or of a training run that continues it, and its context adapter.

    Args:
      root: the checkpoint.
      given: result of train.teacher or train.pruning; None takes the checkpoint's denoiser. A result without a context
        adapter takes the checkpoint's.
      option: the option that named the result, for error messages.
    Raises:
      InputError: a component is missing.
    """
    if given is None:
        return DenoiserFolders(
            checkpoint.component_folder(root, TEACHER), checkpoint.component_folder(root, TEACHER_ADAPTER)
        )
    result = find_result(given, (TEACHER, TEACHER_ADAPTER), option)
    own = result / TEACHER_ADAPTER
    return DenoiserFolders(
        result / TEACHER, own if is_there(own) else checkpoint.component_folder(root, TEACHER_ADAPTER)
    )
