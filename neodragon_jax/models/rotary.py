"""Rotary embedding of the image tokens by their position in time; text tokens, at position 0, are not rotated.

Legend: B batch, S tokens of text and image, I image tokens, X image tokens whose output is read (the last ones),
N heads, K head dim, k = K / 2, R runs of image tokens with one position.
Source: arXiv 2104.09864.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neodragon_jax.base.errors import InputError, did_you_mean
from neodragon_jax.models.heads import HeadOrder
from neodragon_jax.models.layers import last_entries
from neodragon_jax.pyramid.layout import Layout

ROTARY_FORMS = ('halves', 'matrices')


class Rotary(NamedTuple):
    """Rotary embedding of the image tokens, half by half; text is at position 0 and is not rotated.

    Both are [B, I, 1, k], or [B, 1, k, I] for heads in LANES.
    """

    cos: Float[Array, 'B _ _ _']
    sin: Float[Array, 'B _ _ _']


class RotaryMatrices(NamedTuple):
    """Rotary embedding of the image tokens as one matrix per run of tokens with the same position."""

    matrices: Float[Array, 'B R K K']


def rotary_table(positions: int, head_dim: int, theta: float = 10000.0) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin of position * theta^(-2i/K), each [positions, K/2], computed in float64."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.arange(positions, dtype=np.float64)[:, None] * frequencies[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def make_rotary(
    form: str, layout: Layout, ids: Int[Array, 'B S'], positions: int, head_dim: int, order: HeadOrder = HeadOrder.ROWS
) -> Rotary | RotaryMatrices:
    """Return the rotary embedding of the image tokens.

    Args:
      form: 'halves', or 'matrices': one product instead of five passes over queries and keys, for a phone.
      positions: length of the table.
      order: of the heads that are rotated; 'matrices' takes ROWS only.
    Raises:
      InputError: the form is unknown or does not take the order, or the sequence has more frames than the table.
    """
    if form not in ROTARY_FORMS:
        raise InputError(f'rotary is {form!r}.{did_you_mean(form, ROTARY_FORMS)} Use one of {", ".join(ROTARY_FORMS)}.')
    # Indices beyond the table would be clamped to its last row without an error.
    if len(layout.grids) > positions:
        raise InputError(f'{len(layout.grids)} latent frames; the denoiser has positions for {positions}: use fewer.')
    cos, sin = rotary_table(positions, head_dim)
    image = jnp.clip(ids[:, layout.text_tokens :], 0)
    if form == 'halves':
        tables = [jnp.asarray(table)[image] for table in (cos, sin)]
        return Rotary(
            *(table[:, :, None] if order is HeadOrder.ROWS else table.swapaxes(1, 2)[:, None] for table in tables)
        )
    if order is not HeadOrder.ROWS:
        raise InputError('rotary is "matrices", which this attention does not take; use "halves".')
    diagonal = lambda table: np.eye(head_dim // 2, dtype=np.float32) * table[:, None, :]
    matrices = np.block([[diagonal(cos), diagonal(sin)], [-diagonal(sin), diagonal(cos)]])
    return RotaryMatrices(jnp.asarray(matrices)[image[:, :: layout.equal_run]])


def rotate(x: Float[Array, 'B X N K'], rotary: Rotary | RotaryMatrices, image_tokens: int) -> Float[Array, 'B X N K']:
    """Apply the rotary embedding of the last X of all image tokens: dimension i pairs with i + K/2.

    The released weights pair neighbors (2i, 2i + 1); loading permutes them, because contiguous halves are cheap on a
    phone, while interleaving costs a quarter of the graph.

    The TPU kernel's operands are rotated by `operands`.
    """
    if isinstance(rotary, RotaryMatrices):
        batch, rows, _, width = x.shape
        runs = rows * rotary.matrices.shape[1] // image_tokens
        matrices = last_entries(rotary.matrices, runs, axis=1).astype(x.dtype)
        return jnp.matmul(x.reshape(batch, runs, -1, width), matrices).reshape(x.shape)
    cos, sin = (last_entries(table, x.shape[1], axis=1) for table in rotary)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
