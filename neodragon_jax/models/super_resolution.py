"""QuickSRNet: super-resolution of video frames by 2, 3 or 4, the last step of the pipeline.

The network is a few 3x3 convolutions with ReLUs clipped to [0, 1], then depth to space. It is initialized near
nearest-neighbor enlargement: each convolution as the identity, the last one as a copy of each color to all its output
pixels, each plus a random part. In the large variant, a 1x1 convolution of the input makes the copies instead.

Legend: B pictures, h w pixels before and H W after enlargement, s scaling factor (H = s h), C channels, S any shape.
Source: QuickSRNet, arXiv 2303.04336; used by Neodragon, arXiv 2511.06055.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.super_resolution import SuperResolutionConfig

# Frames per call of the network in `upscale`: 8 of 320x512 take 336 MB per layer in the large variant, in float32.
FRAMES_AT_ONCE = 8


def depth_to_space(x: Float[Array, 'B h w _'], factor: int) -> Float[Array, 'B H W C']:
    """Lay out the channels of each pixel as a square of pixels.

    Channel c s^2 + s row + column goes to channel c at (row, column): the order of torch's PixelShuffle, in which all
    pixels of one color are neighbors.
    """
    batch, height, width, depth = x.shape
    x = x.reshape(batch, height, width, depth // factor**2, factor, factor)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height * factor, width * factor, -1)


def clipped_relu(x: Float[Array, '*S']) -> Float[Array, '*S']:
    """Clip to [0, 1]."""
    return jnp.clip(x, 0, 1)


def identity_initializer(copies: int, randomness: float) -> Callable[..., Array]:
    """Return the initializer of a convolution: a random part, plus 1 where output channel i reads input i // copies.

    Args:
      copies: output channels per input channel; 0 leaves the identity out.
      randomness: factor of the random part, which at 1 is uniform in +-1/sqrt(fan in), torch's default.
    """
    uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')

    def initialize(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        rows, columns, inputs, outputs = shape
        kept = np.zeros(shape, np.float32)
        output = np.arange(min(outputs, inputs * copies))
        kept[rows // 2, columns // 2, output // max(copies, 1), output] = 1
        return randomness * uniform(key, shape, dtype) + jnp.asarray(kept, dtype)

    return initialize


class QuickSRNet(nn.Module):
    """Pictures in [0, 1] to larger ones in [0, 1].

    Attributes:
      randomness: factor of the random part of initial weights; at 0 a fresh network enlarges by nearest neighbor.
    """

    config: SuperResolutionConfig
    dtype: Any = None
    randomness: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, 'B h w C']) -> Float[Array, 'B H W C']:
        """Enlarge pictures."""
        config, copies = self.config, self.config.scaling_factor**2
        outputs = config.out_channels * copies

        def conv(y: Array, features: int, size: int, init: Callable[..., Array], name: str) -> Array:
            pad = ((size // 2, size // 2),) * 2  # Explicit, because phone tools need numbers.
            return nn.Conv(features, (size, size), padding=pad, kernel_init=init, dtype=self.dtype, name=name)(y)

        hidden = x
        for index in range(config.num_intermediate_layers + 1):
            init = identity_initializer(1, self.randomness)
            hidden = clipped_relu(conv(hidden, config.num_channels, 3, init, f'conv_{index}'))
        if config.use_ito_connection:
            residual = conv(hidden, outputs, 3, identity_initializer(0, self.randomness), 'conv_last')
            out = residual + conv(x, outputs, 1, identity_initializer(copies, 0.0), 'anchor')
        else:
            out = conv(hidden, outputs, 3, identity_initializer(copies, self.randomness), 'conv_last')
        return depth_to_space(clipped_relu(out), config.scaling_factor)


def upscale(
    apply: Callable[[Float[Array, 'B h w 3']], Float[Array, 'B H W 3']],
    frames: UInt8[np.ndarray, '*S h w 3'] | Float[Array | np.ndarray, '*S h w 3'],
    at_once: int = FRAMES_AT_ONCE,
) -> UInt8[np.ndarray, '*S H W 3'] | Float[np.ndarray, '*S H W 3']:
    """Enlarge frames of the decoder or of a file.

    Args:
      apply: the network as a function of pictures in [0, 1]; compiled by the caller.
      frames: bytes, or floats in [-1, 1]; values beyond are clipped.
      at_once: frames in a call of `apply`. All calls have this size, so that one compilation serves them.
    Returns:
      Frames of the same kind and range as the given ones.
    Raises:
      InputError: there are no frames.
    """
    frames = np.asarray(frames)
    *leading, height, width, channels = frames.shape
    flat = frames.reshape(-1, height, width, channels)
    if not len(flat):
        raise InputError('frames: there are none; give at least one.')
    in_bytes = frames.dtype == np.uint8
    count = min(at_once, len(flat))
    parts = []
    for start in range(0, len(flat), count):
        part = flat[start : start + count].astype(np.float32)
        part = part / 255 if in_bytes else np.clip(part / 2 + 0.5, 0, 1)
        # The last call repeats its last frame.
        filled = np.pad(part, ((0, count - len(part)), (0, 0), (0, 0), (0, 0)), mode='edge')
        large = np.asarray(apply(jnp.asarray(filled)), np.float32)[: len(part)]
        parts.append((large * 255).round().astype(np.uint8) if in_bytes else large * 2 - 1)
    joined = np.concatenate(parts)
    return joined.reshape(*leading, *joined.shape[1:])
