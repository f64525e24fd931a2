"""Rename table of the video VAE; the encoder's half also holds for Pyramid-Flow's native VAE."""

from __future__ import annotations

from neodragon_jax.checkpoint.names.convert import CONV2D, CONV3D, Convert, Entry, dense, norm
from neodragon_jax.config.neodragon import CausalEncoderConfig, VideoVAEConfig
from neodragon_jax.models.vae_decoder import MEMORY_BLOCKS

# Released 1x1x1 convolutions are 2-D here: torch [out, in, 1, 1, 1], Flax [1, 1, in, out].
_POINTWISE = Convert(
    lambda x: x.reshape(*x.shape[:2], 1, 1).transpose(2, 3, 1, 0),
    lambda x: x.transpose(3, 2, 0, 1).reshape(x.shape[3], x.shape[2], 1, 1, 1),
)
_ATTENTION = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'out'}


def video_vae_names(config: VideoVAEConfig) -> list[Entry]:
    """Return every released tensor of the video VAE with its path in the Flax tree."""
    return [*encoder_names(config), *_decoder(config)]


def causal(source: str, path: tuple[str, ...]) -> list[Entry]:
    """Return the tensors of a causal 3-D convolution."""
    return dense(f'{source}.conv', path, weight=CONV3D)


def resnet(source: str, path: tuple[str, ...], changes_width: bool) -> list[Entry]:
    """Return the tensors of a residual block."""
    entries = []
    for index in (1, 2):
        entries += norm(f'{source}.norm{index}', (*path, f'norm_{index}'))
        entries += causal(f'{source}.conv{index}', (*path, f'conv_{index}'))
    if changes_width:
        entries += dense(f'{source}.conv_shortcut.conv', (*path, 'skip'), weight=_POINTWISE)
    return entries


def ends(part: str) -> list[Entry]:
    """Return the tensors of the encoder or decoder outside its levels: first and last layers, and the middle."""
    entries = causal(f'{part}.conv_in', (part, 'conv_in'))
    for index in (0, 1):
        entries += resnet(f'{part}.mid_block.resnets.{index}', (part, f'mid_resnet_{index}'), False)
    source, path = f'{part}.mid_block.attentions.0', (part, 'mid_attention')
    entries += norm(f'{source}.group_norm', (*path, 'norm'))
    for theirs, ours in _ATTENTION.items():
        entries += dense(f'{source}.{theirs}', (*path, ours))
    return entries + norm(f'{part}.conv_norm_out', (part, 'norm_out')) + causal(f'{part}.conv_out', (part, 'conv_out'))


def encoder_names(config: CausalEncoderConfig) -> list[Entry]:
    """Return the tensors of the encoder and of the convolutions next to the latents."""
    entries = ends('encoder')
    previous = config.encoder_block_out_channels[0]
    for level, width in enumerate(config.encoder_block_out_channels):
        source, path = f'encoder.down_blocks.{level}', ('encoder', f'down_{level}')
        for index in range(config.encoder_layers_per_block[level]):
            entries += resnet(f'{source}.resnets.{index}', (*path, f'resnet_{index}'), width != previous)
            previous = width
        if config.encoder_spatial_down_sample[level]:
            entries += causal(f'{source}.downsamplers.0.conv', (*path, 'halve_space'))
        if config.encoder_temporal_down_sample[level]:
            entries += causal(f'{source}.temporal_downsamplers.0.conv', (*path, 'halve_time'))
    for name in ('quant_conv', 'post_quant_conv'):
        entries += dense(f'{name}.conv', (name,), weight=_POINTWISE)
    return entries


def _decoder(config: VideoVAEConfig) -> list[Entry]:
    """Return the tensors of TinyAEHV, released as one numbered list of layers.

    0 bounding, 1 convolution, 2 ReLU; each level adds its memory blocks, upsampling, growth, convolution; then ReLU
    and the last convolution.
    """
    entries = dense('decoder.blocks.1', ('decoder', 'conv_in'), weight=CONV2D)
    number = 3
    for level in range(len(config.decoder_num_features) - 1):
        for index in range(MEMORY_BLOCKS):
            path = ('decoder', f'level_{level}_memory_{index}')
            for conv in range(3):  # The three are separated by ReLUs.
                entries += dense(f'decoder.blocks.{number}.conv.{2 * conv}', (*path, f'conv_{conv}'), weight=CONV2D)
            number += 1
        grow, out = f'decoder.blocks.{number + 1}.conv', f'decoder.blocks.{number + 2}'
        entries += dense(grow, ('decoder', f'level_{level}_grow'), bias=False, weight=CONV2D)
        entries += dense(out, ('decoder', f'level_{level}_out'), bias=False, weight=CONV2D)
        number += 3
    return entries + dense(f'decoder.blocks.{number + 1}', ('decoder', 'conv_out'), weight=CONV2D)
