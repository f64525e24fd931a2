"""Sizes of the teacher: Pyramid-Flow's denoiser and video VAE, and the T5-XXL encoder of its prompts.

Field names are those of Pyramid-Flow's `config.json` files.
Source: Pyramid-Flow, arXiv 2410.05954; Neodragon, arXiv 2511.06055, compares its parts with these.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.component import (
    Count,
    Flags,
    Layers,
    Names,
    Positive,
    Rates,
    Side,
    Width,
    Widths,
    require,
    require_divisor,
    require_lengths,
)
from neodragon_jax.config.neodragon import CausalEncoderConfig, MMDiTConfig, T5EncoderConfig


@dataclasses.dataclass(frozen=True)
class TeacherMMDiTConfig(MMDiTConfig):
    """PyramidDiffusionMMDiT: the denoiser before pruning, with its own linear embedding of the text states."""

    num_layers: Count = 24
    # Off, because Pyramid-Flow's flash attention cannot be causal over frames.
    use_flash_attn: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, use_flash_attn=(False,), caption_projection_dim=(self.width,))


@dataclasses.dataclass(frozen=True)
class PyramidFlowVAEConfig(CausalEncoderConfig):
    """CausalVideoVAE: the causal encoder, and the native decoder that mirrors it.

    Attributes:
      encoder_double_z: whether the encoder gives mean and variance.
      encoder_type, decoder_type: kinds of the two parts.
      decoder_in_channels: channels of the latents.
      decoder_out_channels: colors.
      decoder_layers_per_block: residual blocks of each level.
      decoder_up_block_types: class of each level.
      decoder_block_out_channels: channels of each level, full resolution first.
      decoder_spatial_up_sample: whether a level doubles height and width.
      decoder_temporal_up_sample: whether a level doubles the frames.
      decoder_block_dropout: probability of dropping an activation, by level.
      decoder_act_fn: activation.
      decoder_norm_num_groups: groups of a group norm.
      sample_size: side in pixels of the pictures of the release; not used.
      scaling_factor: of the release; not used.
      add_post_quant_conv: whether a pointwise convolution precedes the decoder.
      interpolate: of the release; not used.
      downsample_scale: pixels per latent.
    """

    encoder_double_z: bool = True
    encoder_type: str = 'causal_vae_conv'
    decoder_in_channels: Width = 16
    decoder_out_channels: Literal[3] = 3
    decoder_layers_per_block: Layers = (3, 3, 3, 3)
    decoder_up_block_types: Names = ('UpDecoderBlockCausal3D',) * 4
    decoder_block_out_channels: Widths = (128, 256, 512, 512)
    decoder_spatial_up_sample: Flags = (True, True, True, False)
    decoder_temporal_up_sample: Flags = (True, True, True, False)
    decoder_block_dropout: Rates = (0.0, 0.0, 0.0, 0.0)
    decoder_act_fn: str = 'silu'
    decoder_norm_num_groups: Width = 32
    decoder_type: str = 'causal_vae_conv'
    sample_size: Side = 256
    scaling_factor: Positive = 0.18215
    add_post_quant_conv: bool = True
    interpolate: bool = False
    downsample_scale: Annotated[int, Field(ge=1, le=64)] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, encoder_double_z=(True,), add_post_quant_conv=(True,), interpolate=(False,))
        require(self, encoder_type=('causal_vae_conv',), decoder_type=('causal_vae_conv',), decoder_act_fn=('silu',))
        require(self, decoder_up_block_types=(('UpDecoderBlockCausal3D',) * len(self.decoder_block_out_channels),))
        require(self, decoder_in_channels=(self.encoder_out_channels,))
        per_level = ('layers_per_block', 'spatial_up_sample', 'temporal_up_sample', 'block_dropout')
        require_lengths(self, 'decoder_block_out_channels', *(f'decoder_{name}' for name in per_level))
        require_divisor(self, 'decoder_norm_num_groups', 'decoder_block_out_channels')
        down, up = self.encoder_spatial_down_sample, self.decoder_spatial_up_sample
        if not 2 ** sum(down) == 2 ** sum(up) == self.downsample_scale:
            raise InputError(
                f'PyramidFlowVAEConfig.downsample_scale is {self.downsample_scale}; the encoder halves {sum(down)} '
                f'times and the decoder doubles {sum(up)} times: give factors that agree.'
            )
        if sum(self.encoder_temporal_down_sample) != sum(self.decoder_temporal_up_sample):
            raise InputError(
                'PyramidFlowVAEConfig.encoder_temporal_down_sample and decoder_temporal_up_sample change the number of '
                'frames by different factors; make them agree.'
            )


TEACHER = TeacherMMDiTConfig()
PYRAMID_FLOW_VAE = PyramidFlowVAEConfig()
T5_XXL = T5EncoderConfig(d_model=4096, d_ff=10240, num_layers=24, num_heads=64)
