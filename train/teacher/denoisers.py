"""Construction of denoisers with and without a context embedder: fresh, read from a folder, or as shapes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.abstract import abstract_params
from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.config.pyramid_flow import TeacherMMDiTConfig
from neodragon_jax.models.mmdit import PyramidMMDiT, stack_blocks
from neodragon_jax.models.teacher import TeacherMMDiT
from train.data.record_spec import DTYPES, T5_STATES, TEXT_STATES
from train.data.sources import Repeated
from train.flow.blank_sample import BlankSample
from train.flow.flow_matching import check_unit_weights
from train.teacher.config import TeacherConfig

AnyDenoiser = PyramidMMDiT | TeacherMMDiT


def without_embedder(module: TeacherMMDiT, params: Mapping[str, Any]) -> tuple[PyramidMMDiT, Any]:
    """Return the denoiser inside a teacher, and its parameters."""
    fields = {field.name: getattr(module.config, field.name) for field in dataclasses.fields(MMDiTConfig)}
    return PyramidMMDiT(MMDiTConfig(**fields), module.dtype, module.scan), params['denoiser']


def fresh_denoiser(sizes: MMDiTConfig, context_embedder: bool) -> PyramidMMDiT | TeacherMMDiT:
    """Return a denoiser of the given sizes, with or without a context embedder."""
    if not context_embedder:
        return PyramidMMDiT(sizes)
    return TeacherMMDiT(TeacherMMDiTConfig(**dataclasses.asdict(sizes)))


def read_denoiser(folder: str | os.PathLike[str]) -> tuple[PyramidMMDiT | TeacherMMDiT, Any]:
    """Return a stored denoiser, with or without an embedder, and its parameters stacked for the scan.

    Raises:
      InputError: the folder is missing, damaged or not a denoiser.
    """
    module, params = checkpoint.load(folder, PyramidMMDiT, TeacherMMDiT)
    if isinstance(module, TeacherMMDiT):
        return module, {**params, 'denoiser': stack_blocks(params['denoiser'], module.config.num_layers)}
    return module, stack_blocks(params, module.config.num_layers)


def check_widths(module: PyramidMMDiT | TeacherMMDiT, null: Mapping[str, np.ndarray]) -> None:
    """Raise InputError unless the text states and pooled vectors of the samples fit the denoiser."""
    config = module.config
    expected = config.joint_attention_dim if isinstance(module, TeacherMMDiT) else config.width
    for name, got, want in (
        ('text states', null['text'].shape[-1], expected),
        ('pooled vectors', null['pooled'].shape[-1], config.pooled_projection_dim),
    ):
        if got != want:
            raise InputError(
                f"the samples' {name} are {got} wide, the denoiser takes {want}: set its sizes accordingly, or make "
                'the samples with other text encoders.'
            )


def blank_latents(blank_sample: BlankSample, config: TeacherConfig) -> Repeated:
    """Return samples of zeros that match a configuration, for a plan without data.

    Raises:
      InputError: there are fewer unit weights than units of a sample.
    """
    check_unit_weights('config.teacher.unit_weights', config.unit_weights, blank_sample.frames)
    sizes, stored = config.sizes, DTYPES['bfloat16']
    text_width = sizes.joint_attention_dim if config.context_embedder else sizes.width
    sample = {
        'latents': np.zeros((blank_sample.frames, blank_sample.height, blank_sample.width, sizes.in_channels), stored),
        'units': np.int32(blank_sample.frames),
        T5_STATES if config.context_embedder else TEXT_STATES: np.zeros((blank_sample.text_tokens, text_width), stored),
        'text_mask': np.ones(blank_sample.text_tokens, np.int32),
        'pooled': np.zeros(sizes.pooled_projection_dim, stored),
    }
    return Repeated(sample, 2**20)


def abstract_denoiser(folder: str | os.PathLike[str]) -> tuple[AnyDenoiser, Any]:
    """Return a stored denoiser and its abstract parameters, in float32, stacked for the scan.

    Raises:
      InputError: the folder's config is missing, damaged or not of a denoiser.
    """
    module = checkpoint.load_module(folder, PyramidMMDiT, TeacherMMDiT)
    return module, abstract_stacked(module)


def abstract_stacked(module: AnyDenoiser) -> Any:
    """Return a denoiser's abstract parameters, in float32, stacked for the scan."""
    return abstract_params(module.clone(scan=True))


def sized(config: TeacherConfig, module: AnyDenoiser) -> TeacherConfig:
    """Return the options with their sizes replaced by those of a denoiser."""
    fields = {field.name: getattr(module.config, field.name) for field in dataclasses.fields(MMDiTConfig)}
    return dataclasses.replace(config, sizes=MMDiTConfig(**fields), context_embedder=isinstance(module, TeacherMMDiT))
