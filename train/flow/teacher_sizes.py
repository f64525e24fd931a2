"""The teacher as shapes, for plans and for sizing: samples of zeros, and denoisers without their numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.models.teacher import TeacherMMDiT
from train.data.record_spec import DTYPES
from train.data.sources import Repeated
from train.teacher.config import RAW_STATES, STATES, TeacherConfig

AnyDenoiser = PyramidMMDiT | TeacherMMDiT


def blank_latents(frames: int, height: int, width: int, text_tokens: int, config: TeacherConfig) -> Repeated:
    """Return samples of zeros that suit a configuration, for a plan without data.

    Args:
      frames, height, width: T, H, W.
      text_tokens: L.
    """
    sizes, stored = config.sizes, DTYPES['bfloat16']
    text_width = sizes.joint_attention_dim if config.context_embedder else sizes.width
    sample = {
        'latents': np.zeros((frames, height, width, sizes.in_channels), stored),
        'units': np.int32(frames),
        RAW_STATES if config.context_embedder else STATES: np.zeros((text_tokens, text_width), stored),
        'text_mask': np.ones(text_tokens, np.int32),
        'pooled': np.zeros(sizes.pooled_projection_dim, stored),
    }
    return Repeated(sample, 2**20)


def abstract_denoiser(folder: str) -> tuple[AnyDenoiser, Any]:
    """Return a stored denoiser and its parameters without their numbers, in float32, stacked for the scan.

    Raises:
      InputError: the folder's config is missing, damaged or of something else.
    """
    module = checkpoint.load_module(folder)
    if not isinstance(module, PyramidMMDiT | TeacherMMDiT):
        raise InputError(f'{folder}: holds a {type(module).__name__}; pass the folder of a denoiser.')
    return module, abstract_stacked(module)


def abstract_stacked(module: AnyDenoiser) -> Any:
    """Return a denoiser's parameters without their numbers, in float32, stacked for the scan."""
    return checkpoint.abstract_params(module.clone(scan=True))


def sized(config: TeacherConfig, module: AnyDenoiser) -> TeacherConfig:
    """Return options with the sizes of a denoiser that decides on them."""
    fields = {field.name: getattr(module.config, field.name) for field in dataclasses.fields(MMDiTConfig)}
    return dataclasses.replace(config, sizes=MMDiTConfig(**fields), context_embedder=isinstance(module, TeacherMMDiT))
