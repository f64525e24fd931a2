"""Image VAE of SDXL: pictures to the moments of a latent distribution and latents to pictures, 8x8 compression.

Legend: B pictures, H W pixel grid, h w latent grid, C latent channels, M = 2C moments, D any channels.
Source: Rombach et al., arXiv 2112.10752, appendix G; SDXL, arXiv 2307.01952, section 2.4.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.sdxl import ImageVAEConfig
from neodragon_jax.models.causal_layers import FrameAttention
from neodragon_jax.models.sdxl_layers import ResnetBlock, conv, group_norm, halving_conv
from neodragon_jax.models.vae_decoder import double_space

_EPSILON = 1e-6


class _Blocks(nn.Module):
    """Common part of both directions: residual blocks, and the middle on the coarsest grid."""

    config: ImageVAEConfig
    dtype: Any = None

    def resnet(self, features: int, name: str) -> ResnetBlock:
        """Return a residual block."""
        return ResnetBlock(features, self.config.norm_num_groups, _EPSILON, self.dtype, name=name)

    def middle(self, x: Array) -> Array:
        """Return the output of residual block, attention, residual block."""
        x = self.resnet(x.shape[-1], 'mid_resnet_0')(x)
        x = FrameAttention(self.config.norm_num_groups, self.dtype, name='mid_attention')(x)
        return self.resnet(x.shape[-1], 'mid_resnet_1')(x)

    def head(self, x: Array, features: int) -> Array:
        """Return the output of the last norm and convolution."""
        x = nn.silu(group_norm(self.config.norm_num_groups, _EPSILON, self.dtype, 'norm_out')(x))
        return conv(features, self.dtype, 'conv_out')(x)


class Encoder(_Blocks):
    """Residual blocks and halvings, the middle, and the convolution to the moments."""

    @nn.compact
    def __call__(self, x: Float[Array, 'B H W 3']) -> Float[Array, 'B h w M']:
        config = self.config
        widths = config.block_out_channels
        x = conv(widths[0], self.dtype, 'conv_in')(x)
        for level, width in enumerate(widths):
            for index in range(config.layers_per_block):
                x = self.resnet(width, f'down_{level}_resnet_{index}')(x)
            if level + 1 < len(widths):
                x = halving_conv(width, 0, self.dtype, f'down_{level}_halve')(x)
        return self.head(self.middle(x), 2 * config.latent_channels)


class Decoder(_Blocks):
    """The middle, residual blocks and doublings, and the convolution to RGB."""

    @nn.compact
    def __call__(self, x: Float[Array, 'B h w C']) -> Float[Array, 'B H W 3']:
        config = self.config
        widths = config.block_out_channels[::-1]
        x = self.middle(conv(widths[0], self.dtype, 'conv_in')(x))
        for level, width in enumerate(widths):
            for index in range(config.layers_per_block + 1):
                x = self.resnet(width, f'up_{level}_resnet_{index}')(x)
            if level + 1 < len(widths):
                x = conv(width, self.dtype, f'up_{level}_double')(double_space(x))
        return self.head(x, config.out_channels)


class AutoencoderKL(nn.Module):
    """`encode` to moments, `decode` to pictures; both use unscaled latents."""

    config: ImageVAEConfig
    dtype: Any = None

    def setup(self) -> None:
        channels = self.config.latent_channels
        self.encoder = Encoder(self.config, self.dtype)
        self.quant_conv = nn.Conv(2 * channels, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(channels, (1, 1), dtype=self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def __call__(self, pictures: Float[Array, 'B H W 3']) -> Float[Array, 'B H W 3']:
        """Return the reconstruction from the posterior mean."""
        mean, _ = jnp.split(self.encode(pictures), 2, axis=-1)
        return self.decode(mean)

    def encode(self, pictures: Float[Array, 'B H W 3']) -> Float[Array, 'B h w M']:
        """Encode pictures in [-1, 1].

        Returns:
          moments: mean and log-variance (not clamped) along the last axis.
        Raises:
          InputError: the pixels do not divide into latents.
        """
        factor = self.config.spatial_factor
        if pictures.shape[1] % factor or pictures.shape[2] % factor:
            height, width = pictures.shape[1:3]
            raise InputError(f'pictures are {height}x{width}; resize or crop them to multiples of {factor}.')
        return self.quant_conv(self.encoder(pictures))

    def decode(self, latents: Float[Array, 'B h w C']) -> Float[Array, 'B H W 3']:
        """Decode latents, already divided by the scaling factor, to pictures in [-1, 1] (not clamped)."""
        return self.decoder(self.post_quant_conv(latents))
