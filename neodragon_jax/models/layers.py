"""Functions and small layers that several models share.

Legend: B batch, L tokens, D width, N heads, K head dim.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def timestep_sinusoid(timestep: Float[Array, ' B'], width: int, max_period: float = 10000.0) -> Float[Array, 'B K']:
    """Embed timesteps as [cos, sin] of geometrically spaced frequencies, in float32.

    The frequencies are rounded to float32 the way the released model was trained: at timestep 1000 one unit in the
    last place of a frequency moves the angle by 1e-4.
    """
    half = width // 2
    exponent = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotary_table(positions: int, head_dim: int, theta: float = 10000.0) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin of position * theta^(-2i/K), each [positions, K/2], computed in float64."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.arange(positions, dtype=np.float64)[:, None] * frequencies[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(
    x: Float[Array, 'B L N K'], cos: Float[Array, '#B L 1 k'], sin: Float[Array, '#B L 1 k']
) -> Float[Array, 'B L N K']:
    """Apply rotary embedding to half-split pairs: dimension i pairs with i + K/2.

    The released weights pair neighbours (2i, 2i + 1); loading permutes them, because contiguous halves cost a phone
    nothing while interleaving costs it a quarter of the graph.
    """
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def sincos_table(size: int, width: int, base: int) -> np.ndarray:
    """Return the fixed 2-D positional table, [size, size, width]: column half first, each [sin, cos].

    Coordinates are index / (size / base), so that a table of any size spans the grid `base` was trained at.
    """
    coordinate = np.arange(size, dtype=np.float64) / (size / base)
    frequencies = 1 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    angles = coordinate[:, None] * frequencies
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)  # size, width / 2
    columns = np.broadcast_to(line[None, :, :], (size, size, width // 2))
    rows = np.broadcast_to(line[:, None, :], (size, size, width // 2))
    return np.concatenate([columns, rows], axis=-1)


def layer_norm(x: Float[Array, '*B D'], epsilon: float = 1e-6) -> Float[Array, '*B D']:
    """Normalise the last axis to mean 0 and variance 1 in float32, without learned parameters."""
    # Flax's layer rather than its formula: exporters turn it into one native node.
    norm = nn.LayerNorm(epsilon, use_bias=False, use_scale=False, use_fast_variance=False, parent=None)
    normed: Any = norm.apply({}, x)
    return normed


def attention(
    query: Float[Array, 'B L N K'],
    key: Float[Array, 'B S N K'],
    value: Float[Array, 'B S N K'],
    bias: Float[Array, '#B 1 L S'],
) -> Float[Array, 'B L N*K']:
    """Softmax attention with an additive bias; scores and softmax in float32."""
    scale = 1 / math.sqrt(query.shape[-1])
    query, value = (query * scale).swapaxes(1, 2), value.swapaxes(1, 2)  # B N L K
    scores = jnp.matmul(query, key.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)  # B N L S
    weights = jax.nn.softmax(scores + bias, axis=-1).astype(value.dtype)
    out = jnp.matmul(weights, value).swapaxes(1, 2)  # B L N K
    return out.reshape(*out.shape[:2], -1)
