"""Sizes of the teacher: Pyramid-Flow's denoiser and video VAE, and the T5-XXL encoder that reads its prompts.

Field names are those of Pyramid-Flow's `config.json` files.
Source: Pyramid-Flow, arXiv 2410.05954; Neodragon, arXiv 2511.06055, compares its parts with these.
"""

from __future__ import annotations

import dataclasses

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.component import require
from neodragon_jax.config.neodragon import CausalEncoderConfig, MMDiTConfig, T5EncoderConfig


@dataclasses.dataclass(frozen=True)
class TeacherMMDiTConfig(MMDiTConfig):
    """PyramidDiffusionMMDiT: the denoiser before pruning, with its own linear embedding of the text states."""

    num_layers: int = 24
    # Pyramid-Flow's flash attention cannot be causal over frames, so its video models have this off.
    use_flash_attn: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, use_flash_attn=(False,), caption_projection_dim=(self.width,))


@dataclasses.dataclass(frozen=True)
class PyramidFlowVAEConfig(CausalEncoderConfig):
    """CausalVideoVAE: the causal encoder, and the native decoder that mirrors it."""

    encoder_double_z: bool = True
    encoder_type: str = 'causal_vae_conv'
    decoder_in_channels: int = 16
    decoder_out_channels: int = 3
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3)
    decoder_up_block_types: tuple[str, ...] = ('UpDecoderBlockCausal3D',) * 4
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_spatial_up_sample: tuple[bool, ...] = (True, True, True, False)
    decoder_temporal_up_sample: tuple[bool, ...] = (True, True, True, False)
    decoder_block_dropout: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    decoder_act_fn: str = 'silu'
    decoder_norm_num_groups: int = 32
    decoder_type: str = 'causal_vae_conv'
    sample_size: int = 256
    scaling_factor: float = 0.18215
    add_post_quant_conv: bool = True
    interpolate: bool = False
    downsample_scale: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.decoder_block_out_channels)
        require(self, encoder_double_z=(True,), add_post_quant_conv=(True,), interpolate=(False,))
        require(self, encoder_type=('causal_vae_conv',), decoder_type=('causal_vae_conv',), decoder_act_fn=('silu',))
        require(self, decoder_up_block_types=(('UpDecoderBlockCausal3D',) * levels,))
        require(self, decoder_in_channels=(self.encoder_out_channels,))
        for name in ('decoder_layers_per_block', 'decoder_spatial_up_sample', 'decoder_temporal_up_sample'):
            if len(getattr(self, name)) != levels:
                raise InputError(f'PyramidFlowVAEConfig.{name} does not have {levels} items, one per decoder level.')


TEACHER = TeacherMMDiTConfig()
PYRAMID_FLOW_VAE = PyramidFlowVAEConfig()
T5_XXL = T5EncoderConfig(d_model=4096, d_ff=10240, num_layers=24, num_heads=64)
