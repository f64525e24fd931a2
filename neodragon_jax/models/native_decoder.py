"""Pyramid-Flow's native video VAE: the causal encoder, and the native decoder that mirrors it.

Neodragon distills this decoder into TinyAEHV. Each of its levels doubles space and then time, by a convolution to four
or two times the channels, which then become pixels or frames. The first latent frame stands for one frame of the
video, so the first frame after each doubling of time is dropped: t latents give 8 (t - 1) + 1 frames.

Legend: B batch, t latent frames, h w latent grid, T H W frames and pixels after a layer, C D channels in and out.
Source: Pyramid-Flow, arXiv 2410.05954, section 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.pyramid_flow import PyramidFlowVAEConfig
from neodragon_jax.models.causal_layers import CONTEXT, CausalConv, ResnetBlock, middle, project_out
from neodragon_jax.models.vae import CausalVAE, Latents, Video, in_chunks


def channels_to_space(x: Float[Array, '*B h w c']) -> Float[Array, '*B H W C']:
    """Double height and width: channels ordered (C, row, column) become 2x2 pixels."""
    *lead, height, width, channels = x.shape
    x = x.reshape(-1, height, width, channels // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(*lead, 2 * height, 2 * width, channels // 4)


def channels_to_time(x: Float[Array, 'B *t H W c'], first: bool) -> Float[Array, 'B *T H W C']:
    """Double the frames: channels ordered (C, frame) become pairs; drop the first frame of a video.

    A picture stays a picture: of its two frames the first is dropped.
    """
    x = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    if x.ndim == 5:
        return x[..., 1]
    x = jnp.moveaxis(x, -1, 2)  # B t 2 H W C
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, int(first) :]


class UpBlock(nn.Module):
    """Residual blocks, then doubling of space, then doubling of time, each if the config enables it."""

    features: int
    layers: int
    groups: int
    double_space: bool
    double_time: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, 'B *t h w C'], first: bool) -> Float[Array, 'B *T H W D']:
        """Return the level's output; `first` tells whether `x` starts the video."""
        for index in range(self.layers):
            x = ResnetBlock(self.features, self.groups, self.dtype, name=f'resnet_{index}')(x)
        if self.double_space:
            x = channels_to_space(CausalConv(4 * self.features, dtype=self.dtype, name='double_space')(x))
        if self.double_time:
            x = channels_to_time(CausalConv(2 * self.features, dtype=self.dtype, name='double_time')(x), first)
        return x


class NativeDecoder(nn.Module):
    """A middle with attention, up blocks, and the convolution to pixels."""

    config: PyramidFlowVAEConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, latents: Float[Array, 'B *t h w C'], first: bool) -> Float[Array, 'B *T H W 3']:
        """Return frames in [-1, 1] (not clamped); `first` tells whether the latents start the video."""
        config, dtype, groups = self.config, self.dtype, self.config.decoder_norm_num_groups
        widths = config.decoder_block_out_channels[::-1]
        x = middle(CausalConv(widths[0], dtype=dtype, name='conv_in')(latents), groups, dtype)
        for index, width in enumerate(widths):
            # The widths are listed from the pixels inwards, everything else from the latents outwards.
            x = UpBlock(
                width,
                layers=config.decoder_layers_per_block[index],
                groups=groups,
                double_space=config.decoder_spatial_up_sample[index],
                double_time=config.decoder_temporal_up_sample[index],
                dtype=dtype,
                name=f'up_{index}',
            )(x, first)
        return project_out(x, config.decoder_out_channels, groups, dtype)


class NativeVAE(CausalVAE[PyramidFlowVAEConfig]):
    """Pyramid-Flow's video VAE: `encode` to moments, `decode` to frames."""

    def setup(self) -> None:
        super().setup()
        self.decoder = NativeDecoder(self.config, self.dtype)

    def decode(self, latents: Latents) -> Video:
        """Decode whole clips of de-normalized latents to 8 (t - 1) + 1 frames in [-1, 1] (not clamped)."""
        if latents.shape[1] > 1:
            return self.decoder(self.post_quant_conv(latents), first=True)
        return self.decoder(self.post_quant_conv(latents[:, 0]), first=True)[:, None]

    def decode_next(self, latents: Latents) -> Video:
        """Decode the next latents of a video; the collection 'context' must be mutable. See `decode_chunked`."""
        return self.decoder(self.post_quant_conv(latents), first=CONTEXT not in self.variables)


def decode_chunked(model: NativeVAE, params: Mapping[str, Any], latents: Latents, window: int = 2) -> Video:
    """Decode a long video in chunks of `window` latent frames after the first one; equal to decoding it whole.

    Every causal convolution keeps its last two frames, so peak memory is that of one chunk.

    Args:
      latents: de-normalized.
    Raises:
      InputError: the window is empty.
    """
    if window < 1:
        raise InputError(f'window is {window} latent frames; use at least 1.')
    return in_chunks(model, 'decode_next', params, latents, window)
