"""TinyAEHV, the small recurrent decoder of the video VAE: latents to frames, with its memories as explicit state.

A latent frame becomes two, four, then eight frames. The code keeps the frames of one latent apart, as *phases*: a
list of arrays `[B*T, H, W, C]`, where phase j holds the j-th frame of every latent. The frame before phase j > 0 is
phase j - 1 of the same latent; the frame before phase 0 is the last phase of the previous latent or, for the first
latent, the memory. Temporal upsampling is then a slice of channels. One definition runs all latents of a clip in
parallel, or one latent at a time without data movement, as on a phone.

Legend: B batch, T latent frames, N = B*T, H W grid, C D channels in and out, F frames.
Source: arXiv 2511.06055, section on asymmetric decoder distillation; the design follows the public TAEHV.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from neodragon_jax.config.neodragon import VideoVAEConfig

MEMORY_BLOCKS = 3  # per level

Phases = list[Float[Array, 'N H W C']]
Memories = tuple[Float[Array, 'B _ _ _'], ...]  # one per memory block, on its grid and of its width


def _conv(features: int, kernel: int, dtype: Any, name: str, use_bias: bool = True) -> nn.Conv:
    """Return a square convolution that keeps the grid; padding is explicit because the phone tools need numbers."""
    pad = kernel // 2
    padding = ((pad, pad), (pad, pad))
    return nn.Conv(features, (kernel, kernel), padding=padding, use_bias=use_bias, dtype=dtype, name=name)


def double_space(x: Float[Array, 'N h w C']) -> Float[Array, 'N H W C']:
    """Double height and width, nearest neighbor; this form exports to one Resize node."""
    batch, height, width, channels = x.shape
    return jax.image.resize(x, (batch, 2 * height, 2 * width, channels), 'nearest')


def _delayed(
    x: Float[Array, 'N H W C'], memory: Float[Array, 'B H W C']
) -> tuple[Float[Array, 'N H W C'], Float[Array, 'B H W C']]:
    """Delay a phase by one latent: prepend the memory, and return the last latent as the new memory."""
    if x.shape[0] == memory.shape[0]:
        return memory, x
    clip = x.reshape(memory.shape[0], -1, *x.shape[1:])  # B T H W C
    shifted = jnp.concatenate([memory[:, None].astype(x.dtype), clip[:, :-1]], axis=1)
    return shifted.reshape(x.shape), clip[:, -1]


class MemoryBlock(nn.Module):
    """Residual block on each frame and the frame before it: ReLU(x + convs([x, previous x]))."""

    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, phases: Phases, memory: Float[Array, 'B H W C']) -> tuple[Phases, Float[Array, 'B H W C']]:
        """Return the new phases, and this block's last input frame as the next memory."""
        first, second, third = (_conv(self.features, 3, self.dtype, f'conv_{index}') for index in range(3))
        previous, memory = _delayed(phases[-1], memory)
        outputs = []
        for x in phases:
            y = nn.relu(first(jnp.concatenate([x, previous.astype(x.dtype)], axis=-1)))
            outputs.append(nn.relu(x + third(nn.relu(second(y)))))
            previous = x
        return outputs, memory


class Decoder(nn.Module):
    """Latents to frames, three levels of memory blocks, doubling and growth."""

    config: VideoVAEConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, latents: Float[Array, 'N h w C'], memories: Memories) -> tuple[list[Array], Memories]:
        """Decode latents of B clips, batch-major.

        Args:
          latents: de-normalized, after the post-quantization convolution.
          memories: one array per memory block, as `memory_shapes` gives them.
        Returns:
          phases: the frames of each latent in [-1, 1] (not clamped), each phase [N, H, W, 3].
          memories: the state for the latents that follow.
        """
        config, dtype = self.config, self.dtype
        widths, remaining, kept = config.decoder_num_features, list(memories), []
        # Bound the input softly: distilled decoders meet latents far outside the training range.
        phases = [nn.relu(_conv(widths[0], 3, dtype, 'conv_in')(3 * jnp.tanh(latents / 3)))]
        for level, width in enumerate(widths[:-1]):
            for index in range(MEMORY_BLOCKS):
                block = MemoryBlock(width, dtype, name=f'level_{level}_memory_{index}')
                phases, memory = block(phases, remaining.pop(0))
                kept.append(memory)
            if config.decoder_space_upscale[level]:
                phases = [double_space(x) for x in phases]
            growth = 2 if config.decoder_time_upscale[level] else 1
            grow = _conv(growth * width, 1, dtype, f'level_{level}_grow', use_bias=False)
            phases = [frame for x in phases for frame in jnp.split(grow(x), growth, axis=-1)]
            out = _conv(widths[level + 1], 3, dtype, f'level_{level}_out', use_bias=False)
            phases = [out(x) for x in phases]
        to_rgb = _conv(3, 3, dtype, 'conv_out')
        return [to_rgb(nn.relu(x)) for x in phases], tuple(kept)


def memory_shapes(config: VideoVAEConfig, batch: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Return the shape of each memory, in the order of the blocks, for latents of height x width."""
    shapes = []
    for level, features in enumerate(config.decoder_num_features[:-1]):
        shapes += [(batch, height, width, features)] * MEMORY_BLOCKS
        if config.decoder_space_upscale[level]:
            height, width = 2 * height, 2 * width
    return shapes
