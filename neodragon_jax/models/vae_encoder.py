"""Causal 3-D encoder of the video VAEs: pixels to the moments of a latent distribution.

Legend: B batch, T frames, H W pixel grid, h w grid after a layer, C D channels in and out.
Source: Pyramid-Flow, arXiv 2410.05954, section 3.4; Neodragon, arXiv 2511.06055, keeps this encoder unchanged.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from neodragon_jax.config.neodragon import CausalEncoderConfig
from neodragon_jax.models.causal_layers import CausalConv, ResnetBlock, middle, project_out


class DownBlock(nn.Module):
    """Residual blocks, then halving of space, then halving of time, each if the config enables it."""

    features: int
    layers: int
    groups: int
    halve_space: bool
    halve_time: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, 'B *T H W C']) -> Float[Array, 'B *t h w D']:
        for index in range(self.layers):
            x = ResnetBlock(self.features, self.groups, self.dtype, name=f'resnet_{index}')(x)
        if self.halve_space:
            x = CausalConv(self.features, (1, 2, 2), self.dtype, name='halve_space')(x)
        if self.halve_time:
            x = CausalConv(self.features, (2, 1, 1), self.dtype, name='halve_time')(x)
        return x


class Encoder(nn.Module):
    """Down blocks, a middle with attention, and the convolution to 2 * encoder_out_channels."""

    config: CausalEncoderConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, 'B *T H W 3']) -> Float[Array, 'B *t h w D']:
        config, dtype = self.config, self.dtype
        widths, groups = config.encoder_block_out_channels, config.encoder_norm_num_groups
        x = CausalConv(widths[0], dtype=dtype, name='conv_in')(x)
        for index, width in enumerate(widths):
            x = DownBlock(
                width,
                layers=config.encoder_layers_per_block[index],
                groups=groups,
                halve_space=config.encoder_spatial_down_sample[index],
                halve_time=config.encoder_temporal_down_sample[index],
                dtype=dtype,
                name=f'down_{index}',
            )(x)
        x = middle(x, groups, dtype)
        return project_out(x, 2 * config.encoder_out_channels, groups, dtype)
