"""Layers that the first-frame UNet and its image VAE share.

Legend: B pictures, H W grid, h w grid after a layer, C D channels in and out, E embedding width.
Source: SDXL, arXiv 2307.01952.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


def group_norm(groups: int, epsilon: float, dtype: Any, name: str | None = None) -> nn.GroupNorm:
    """Return a group norm with float32 statistics; in this form exporters turn it into one native node."""
    return nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, name=name)


def conv(features: int, dtype: Any, name: str | None = None) -> nn.Conv:
    """Return a 3x3 convolution that keeps the grid."""
    return nn.Conv(features, (3, 3), padding=((1, 1), (1, 1)), dtype=dtype, name=name)


def halving_conv(features: int, pad_before: int, dtype: Any, name: str) -> nn.Conv:
    """Return a 3x3 convolution of stride 2, zero-padded by `pad_before` before the picture and by 1 after it."""
    pad = (pad_before, 1)
    return nn.Conv(features, (3, 3), strides=(2, 2), padding=(pad, pad), dtype=dtype, name=name)


class ResnetBlock(nn.Module):
    """Two norm-SiLU-convolution layers around a skip; a pointwise skip where the width changes."""

    features: int
    groups: int
    epsilon: float
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B H W C'], embedding: Float[Array, 'B E'] | None = None
    ) -> Float[Array, 'B H W D']:
        """Return the block's output; `embedding` (already activated) shifts the channels between the layers."""
        y = nn.silu(group_norm(self.groups, self.epsilon, self.dtype, 'norm_1')(x))
        y = conv(self.features, self.dtype, 'conv_1')(y)
        if embedding is not None:
            shift = nn.Dense(self.features, dtype=jnp.float32, name='embedding')(embedding)
            y = y + shift.reshape(-1, 1, 1, self.features).astype(y.dtype)
        y = nn.silu(group_norm(self.groups, self.epsilon, self.dtype, 'norm_2')(y))
        y = conv(self.features, self.dtype, 'conv_2')(y)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=self.dtype, name='skip')(x)
        return x + y
