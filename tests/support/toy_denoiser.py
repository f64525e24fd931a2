"""A denoiser of four blocks, one of which is the identity."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from neodragon_jax.checkpoint.random_params import random_params
from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.models.mmdit import PyramidMMDiT

BLOCKS, IDENTITY, WIDTH, TOKENS, POOLED, CHANNELS, GRID = 4, 1, 32, 3, 6, 4, 8


SIZES = MMDiTConfig(
    num_layers=BLOCKS,
    num_attention_heads=2,
    attention_head_dim=16,
    caption_projection_dim=WIDTH,
    joint_attention_dim=WIDTH,
    pooled_projection_dim=POOLED,
    in_channels=CHANNELS,
    sample_size=GRID,
    pos_embed_max_size=GRID,
)


@functools.cache
def denoiser() -> tuple[PyramidMMDiT, dict[str, Any]]:
    """Return a denoiser with random parameters, unrolled; one of its blocks adds nothing: its gates are zero."""
    params = random_params('PyramidMMDiT', SIZES, 0)
    params[f'modulators_{IDENTITY}'] = jax.tree.map(np.zeros_like, params[f'modulators_{IDENTITY}'])
    return PyramidMMDiT(SIZES), params
