"""Causal 3-D layers of the video VAEs.

Every layer takes a clip `[B, T, H, W, C]` or a single picture `[B, H, W, C]`. A picture is treated as the first frame
of a clip. A causal convolution pads that frame with two frames of zeros, so only the last time slice of each kernel
acts: the same parameters run as a 2-D network with a third of the arithmetic. Both ranks give the same output exactly.

Legend: B batch, T frames, H W pixel grid, h w grid after a layer, C D channels in and out.
Source: Pyramid-Flow, arXiv 2410.05954, section 3.4.
"""

from __future__ import annotations

import math
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# The collection that carries the past of every causal convolution from one chunk of a long clip to the next.
CONTEXT = 'context'

_NORM_EPSILON = 1e-6
_SPACE_PADDING = ((1, 1), (1, 1))


def frame_norm(groups: int, dtype: Any, name: str) -> nn.GroupNorm:
    """Return a group norm with float32 statistics per frame, for clips and pictures."""
    return nn.GroupNorm(groups, epsilon=_NORM_EPSILON, reduction_axes=(-3, -2, -1), dtype=dtype, name=name)


class CausalConv(nn.Module):
    """3x3x3 convolution that sees the current and the two previous frames; zeros precede the first one.

    To process a clip in chunks, make the collection CONTEXT mutable: each call then reads the last frames of the
    previous chunk from it and stores its own.
    """

    features: int
    strides: tuple[int, int, int] = (1, 1, 1)
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, 'B *T H W C']) -> Float[Array, 'B *t h w D']:
        kernel = self.param('kernel', nn.initializers.lecun_normal(), (3, 3, 3, x.shape[-1], self.features))
        bias = self.param('bias', nn.initializers.zeros_init(), (self.features,))
        if x.ndim == 4:
            # The kernel is sliced first: the export is then one convolution with constant weights.
            return self._convolve(x, kernel[-1], bias, self.strides[1:], _SPACE_PADDING)
        x, zero_frames = self._with_past(x)
        return self._convolve(x, kernel, bias, self.strides, ((zero_frames, 0), *_SPACE_PADDING))

    def _convolve(
        self,
        x: Array,
        kernel: Array | np.ndarray,
        bias: Array | np.ndarray,
        strides: tuple[int, ...],
        padding: tuple[tuple[int, int], ...],
    ) -> Array:
        """Apply a convolution with given parameters, as nn.Conv because exporters recognize it."""
        conv = nn.Conv(self.features, kernel.shape[:-2], strides, padding, dtype=self.dtype, parent=None)
        return cast(Array, conv.apply({'params': {'kernel': kernel, 'bias': bias}}, x))

    def _with_past(self, x: Float[Array, 'B T H W C']) -> tuple[Float[Array, 'B t H W C'], int]:
        """Return the clip after the stored context frames, if any, and the number of zero frames still to pad."""
        if self.is_initializing() or not self.is_mutable_collection(CONTEXT):
            return x, 2
        nothing = jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
        x = jnp.concatenate([self.get_variable(CONTEXT, 'frames', nothing), x], axis=1)
        # The next window starts `stride` frames after the last one did.
        self.put_variable(CONTEXT, 'frames', x[:, self.strides[0] - 3 :])
        return x, 0


class ResnetBlock(nn.Module):
    """Two norm-SiLU-convolution layers around a skip; a pointwise skip where the width changes."""

    features: int
    groups: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, 'B *T H W C']) -> Float[Array, 'B *T H W D']:
        y = nn.silu(frame_norm(self.groups, self.dtype, 'norm_1')(x))
        y = CausalConv(self.features, dtype=self.dtype, name='conv_1')(y)
        y = nn.silu(frame_norm(self.groups, self.dtype, 'norm_2')(y))
        y = CausalConv(self.features, dtype=self.dtype, name='conv_2')(y)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=self.dtype, name='skip')(x)
        return x + y


class FrameAttention(nn.Module):
    """Single-head attention among the pixels of each frame, around a skip; scores and softmax in float32."""

    groups: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, 'B *T H W C']) -> Float[Array, 'B *T H W C']:
        *_, height, width, features = x.shape
        # One row per pixel of all frames: a Dense of rank 2 exports to one matrix product.
        pixels = frame_norm(self.groups, self.dtype, 'norm')(x).reshape(-1, features)
        query, key, value = (
            nn.Dense(features, dtype=self.dtype, name=name)(pixels).reshape(-1, height * width, features)
            for name in ('query', 'key', 'value')
        )
        scores = jnp.matmul(query / math.sqrt(features), key.swapaxes(1, 2), preferred_element_type=jnp.float32)
        mixed = jnp.matmul(jax.nn.softmax(scores, axis=-1).astype(value.dtype), value)
        return x + nn.Dense(features, dtype=self.dtype, name='out')(mixed.reshape(-1, features)).reshape(x.shape)


def middle(x: Float[Array, 'B *T H W C'], groups: int, dtype: Any) -> Float[Array, 'B *T H W C']:
    """Apply residual block, attention, residual block at the narrow end, as submodules of the calling module."""
    x = ResnetBlock(x.shape[-1], groups, dtype, name='mid_resnet_0')(x)
    x = FrameAttention(groups, dtype, name='mid_attention')(x)
    return ResnetBlock(x.shape[-1], groups, dtype, name='mid_resnet_1')(x)


def project_out(x: Float[Array, 'B *T H W C'], features: int, groups: int, dtype: Any) -> Float[Array, 'B *T H W D']:
    """Apply the last norm, SiLU and convolution, as submodules of the calling module."""
    x = nn.silu(frame_norm(groups, dtype, 'norm_out')(x))
    return CausalConv(features, dtype=dtype, name='conv_out')(x)
