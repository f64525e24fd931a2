"""The teacher of the step distillation: read from a checkpoint, or its shapes alone for sizing."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.abstract import abstract_params
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.checkpoint.folders import TEACHER
from neodragon_jax.checkpoint.results import find_teacher
from neodragon_jax.config.neodragon import FULL
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.mmdit import PyramidMMDiT, stack_blocks


class MultiStepTeacher(NamedTuple):
    """The multi-step denoiser with its adapter and identity."""

    module: PyramidMMDiT
    params: dict[str, Any]  # float32, blocks stacked for the scan; abstract arrays when only shapes are known
    adapter: tuple[ContextAdapter, Any] | None  # with its parameters; None when only shapes are known
    fingerprint: str


def read_teacher(root: str, result: str = '') -> MultiStepTeacher:
    """Read the teacher of a checkpoint in the released layout, or of a training run.

    Args:
      result: see `find_teacher`; '' takes the checkpoint's own.
    Raises:
      InputError: the checkpoint cannot be read or holds something else.
    """
    folders = find_teacher(root, result or None, 'config.teacher')
    module, params = checkpoint.load(folders.denoiser, PyramidMMDiT)
    adapter, adapter_params = checkpoint.load(folders.adapter, ContextAdapter)
    stacked = jax.tree.map(lambda a: np.asarray(a, np.float32), stack_blocks(params, module.config.num_layers))
    return MultiStepTeacher(module, stacked, (adapter, adapter_params), fingerprint(folders.denoiser))


def abstract_teacher(root: str) -> MultiStepTeacher:
    """Return a teacher without its weights: of the sizes in a checkpoint, or of the released ones where root is ''.

    Raises:
      InputError: the checkpoint's config cannot be read or is of something else.
    """
    module = PyramidMMDiT(FULL.denoiser)
    if root:
        module = checkpoint.load_module(checkpoint.component_folder(root, TEACHER), PyramidMMDiT)
    return MultiStepTeacher(module, abstract_params(module.clone(scan=True)), None, 'abstract')
