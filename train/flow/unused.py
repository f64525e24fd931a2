"""Arithmetic of a denoiser that no result depends on: padding of short histories, and masked scores.

All units of a stage share one shape, the envelope, so that a unit with a shorter history computes padding. Attention is
causal over frames, but forms other than `prefix` compute every score and mask most of those on later frames. The model
FLOPs of `train.aot` include both; these shares tell how much that is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.pyramid.history import envelope
from neodragon_jax.pyramid.layout import Layout, attention_mask, position_ids
from neodragon_jax.pyramid.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Unused:
    """Shares of the FLOPs of a denoiser's blocks, from 0 to 1.

    Attributes:
      padding: products and scores of padding.
      masked: scores of real tokens with keys that they may not see.
    """

    padding: float
    masked: float


def unused_in_stages(
    stages: Iterable[int],
    sample: Mapping[str, Any],
    config: MMDiTConfig,
    schedule: Schedule,
    first_unit: int,
    unit_weights: Sequence[float],
) -> Unused:
    """Return the unused shares of a step that calls a denoiser on one example of each of the stages.

    Args:
      sample: latents [T, H, W, C] and text_mask [L], abstract or not.
      unit_weights: relative frequency of the units from `first_unit` on; () for equal ones.
    """
    frames, height, width, _ = sample['latents'].shape
    patch, text = config.patch_size, sample['text_mask'].shape[0]
    units = range(first_unit, frames)
    shares = dict(zip(units, unit_weights or [1.0] * len(units), strict=False))
    grid = height // patch, width // patch
    layouts = [(envelope(stage, frames - 1, schedule.stages, grid, text), shares) for stage in stages]
    return unused(layouts, config.width)


def unused(layouts: Iterable[tuple[Layout, Mapping[int, float]]], width: int) -> Unused:
    """Return the unused shares of calls of a denoiser, one in each of the layouts; captions fill their tokens.

    Args:
      layouts: the envelope of a call, and the relative frequency of each unit in it.
      width: of the token streams.
    """
    total = padding = masked = 0.0
    for layout, units in layouts:
        everything = _flops(layout.tokens, layout.tokens**2, width)
        for unit, share in units.items():
            tokens, pairs = _real(layout, unit)
            weight = share / sum(units.values())
            total += weight * everything
            padding += weight * (everything - _flops(tokens, tokens**2, width))
            masked += weight * (_flops(tokens, tokens**2, width) - _flops(tokens, pairs, width))
    return Unused(padding / total, masked / total)


def _flops(tokens: int, pairs: int, width: int) -> float:
    """Return the FLOPs of a block: four projections and an MLP of four times the width; scores and weighted values."""
    return 2.0 * (tokens * (4 + 2 * 4) * width**2 + 2 * pairs * width)


def _real(layout: Layout, unit: int) -> tuple[int, int]:
    """Return the number of tokens that are no padding, and of pairs of them that may see each other."""
    frame_ids = jnp.arange(1 - len(layout.grids), 1)[None] + unit
    ids, text = position_ids(layout, frame_ids), jnp.ones((1, layout.text_tokens), jnp.int32)
    real = ids[0] >= 0
    allowed = attention_mask(ids, text)[0, 0]
    return int(real.sum()), int((allowed & real[:, None] & real[None]).sum())
