"""Rename table of Pyramid-Flow's native video VAE."""

from __future__ import annotations

from neodragon_jax.checkpoint.names.convert import Entry
from neodragon_jax.checkpoint.names.vae import causal, encoder_names, ends, resnet
from neodragon_jax.config.pyramid_flow import PyramidFlowVAEConfig


def native_vae_names(config: PyramidFlowVAEConfig) -> list[Entry]:
    """Return every released tensor of CausalVideoVAE with its path in the Flax tree."""
    entries = encoder_names(config) + ends('decoder')
    widths = config.decoder_block_out_channels[::-1]
    previous = widths[0]
    for level, width in enumerate(widths):
        source, path = f'decoder.up_blocks.{level}', ('decoder', f'up_{level}')
        for index in range(config.decoder_layers_per_block[level]):
            entries += resnet(f'{source}.resnets.{index}', (*path, f'resnet_{index}'), width != previous)
            previous = width
        if config.decoder_spatial_up_sample[level]:
            entries += causal(f'{source}.upsamplers.0.conv', (*path, 'double_space'))
        if config.decoder_temporal_up_sample[level]:
            entries += causal(f'{source}.temporal_upsamplers.0.conv', (*path, 'double_time'))
    return entries
