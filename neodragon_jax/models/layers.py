"""Functions and small layers that several models share.

Legend: B batch, D width.
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

    The frequencies are rounded to float32 as in the training of the released model: at timestep 1000, one unit in the
    last place of a frequency changes the angle by 1e-4.
    """
    half = width // 2
    exponent = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos_table(size: int, width: int, base: int) -> np.ndarray:
    """Return the fixed 2-D positional table, [size, size, width]: column half first, each [sin, cos].

    Coordinates are index / (size / base), so that a table of any size spans the training grid of size `base`.
    """
    coordinate = np.arange(size, dtype=np.float64) / (size / base)
    frequencies = 1 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    angles = coordinate[:, None] * frequencies
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)  # size, width / 2
    columns = np.broadcast_to(line[None, :, :], (size, size, width // 2))
    rows = np.broadcast_to(line[:, None, :], (size, size, width // 2))
    return np.concatenate([columns, rows], axis=-1)


def layer_norm(x: Float[Array, '*B D'], epsilon: float = 1e-6, one_pass: bool = False) -> Float[Array, '*B D']:
    """Normalize the last axis to mean 0 and variance 1 in float32, without learned parameters.

    Args:
      one_pass: compute the variance as mean(x^2) - mean(x)^2, which reads x once: faster, and less exact where the mean
        exceeds the deviation by far.
    """
    # Flax's layer rather than its formula: exporters turn it into one native node.
    norm = nn.LayerNorm(epsilon, use_bias=False, use_scale=False, use_fast_variance=one_pass, parent=None)
    normed: Any = norm.apply({}, x)
    return normed


def last_entries(x: Array, count: int, axis: int) -> Array:
    """Return the last entries along an axis, or the array itself if it has no others."""
    size = x.shape[axis]
    return x if count == size else jax.lax.slice_in_dim(x, size - count, size, axis=axis)
