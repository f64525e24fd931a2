"""Rename tables of the first-frame model: its UNet and its image VAE."""

from __future__ import annotations

from neodragon_jax.checkpoint.names.convert import CONV2D, Entry, dense, norm
from neodragon_jax.config.sdxl import ImageVAEConfig, Level, UNetConfig

Path = tuple[str, ...]

_ATTENTION = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'out'}


def unet_names(config: UNetConfig) -> list[Entry]:
    """Return every released tensor of the UNet with its path in the Flax tree."""
    entries = _conv('conv_in', ('conv_in',))
    for name in ('time_embedding', 'add_embedding'):
        for linear in ('linear_1', 'linear_2'):
            entries += dense(f'{name}.{linear}', (name, linear))
    for index, level in enumerate(config.down_levels):
        entries += _level(f'down_blocks.{index}', (f'down_{index}',), level)
        if level.resamples:
            entries += _conv(f'down_blocks.{index}.downsamplers.0.conv', (f'down_{index}', 'halve'))
    entries += _resnet('mid_block.resnets.0', ('mid',), changes_width=False, embedded=True)
    for index, level in enumerate(config.up_levels):
        entries += _level(f'up_blocks.{index}', (f'up_{index}',), level)
        if level.resamples:
            entries += _conv(f'up_blocks.{index}.upsamplers.0.conv', (f'up_{index}', 'double'))
    return entries + norm('conv_norm_out', ('norm_out',)) + _conv('conv_out', ('conv_out',))


def image_vae_names(config: ImageVAEConfig) -> list[Entry]:
    """Return every released tensor of the image VAE with its path in the Flax tree."""
    widths, layers = config.block_out_channels, config.layers_per_block
    return [
        *_ends('encoder'),
        *_vae_levels('encoder.down_blocks', 'downsamplers', ('encoder', 'down', 'halve'), widths, layers),
        *_conv('quant_conv', ('quant_conv',)),
        *_conv('post_quant_conv', ('post_quant_conv',)),
        *_ends('decoder'),
        *_vae_levels('decoder.up_blocks', 'upsamplers', ('decoder', 'up', 'double'), widths[::-1], layers + 1),
    ]


def _conv(source: str, path: Path) -> list[Entry]:
    """Return the tensors of a 2-D convolution."""
    return dense(source, path, weight=CONV2D)


def _resnet(source: str, path: Path, changes_width: bool, embedded: bool) -> list[Entry]:
    """Return the tensors of a residual block."""
    entries = []
    for index in (1, 2):
        entries += norm(f'{source}.norm{index}', (*path, f'norm_{index}'))
        entries += _conv(f'{source}.conv{index}', (*path, f'conv_{index}'))
    if embedded:
        entries += dense(f'{source}.time_emb_proj', (*path, 'embedding'))
    if changes_width:
        entries += _conv(f'{source}.conv_shortcut', (*path, 'skip'))
    return entries


def _level(source: str, path: Path, level: Level) -> list[Entry]:
    """Return the tensors of the residual blocks and transformers of a level."""
    entries = []
    for index, (width, depth) in enumerate(zip(level.inputs, level.depths, strict=True)):
        changes = width != level.features
        entries += _resnet(f'{source}.resnets.{index}', (*path, f'resnet_{index}'), changes, embedded=True)
        if depth:
            entries += _transformer(f'{source}.attentions.{index}', (*path, f'transformer_{index}'), depth)
    return entries


def _transformer(source: str, path: Path, depth: int) -> list[Entry]:
    """Return the tensors of a transformer of `depth` blocks."""
    entries = norm(f'{source}.norm', (*path, 'norm'))
    entries += dense(f'{source}.proj_in', (*path, 'in')) + dense(f'{source}.proj_out', (*path, 'out'))
    for index in range(depth):
        theirs, ours = f'{source}.transformer_blocks.{index}', (*path, f'block_{index}')
        for number in (1, 2, 3):
            entries += norm(f'{theirs}.norm{number}', (*ours, f'norm_{number}'))
        for attention, name in (('attn1', 'self_attention'), ('attn2', 'text_attention')):
            for linear, role in _ATTENTION.items():
                entries += dense(f'{theirs}.{attention}.{linear}', (*ours, name, role), bias=role == 'out')
        entries += dense(f'{theirs}.ff.net.0.proj', (*ours, 'mlp_in')) + dense(f'{theirs}.ff.net.2', (*ours, 'mlp_out'))
    return entries


def _ends(part: str) -> list[Entry]:
    """Return the tensors of the VAE's encoder or decoder outside its levels."""
    entries = _conv(f'{part}.conv_in', (part, 'conv_in'))
    for index in (0, 1):
        source, path = f'{part}.mid_block.resnets.{index}', (part, f'mid_resnet_{index}')
        entries += _resnet(source, path, changes_width=False, embedded=False)
    source, path = f'{part}.mid_block.attentions.0', (part, 'mid_attention')
    entries += norm(f'{source}.group_norm', (*path, 'norm'))
    for linear, role in _ATTENTION.items():
        entries += dense(f'{source}.{linear}', (*path, role))
    return entries + norm(f'{part}.conv_norm_out', (part, 'norm_out')) + _conv(f'{part}.conv_out', (part, 'conv_out'))


def _vae_levels(source: str, resampler: str, ours: Path, widths: tuple[int, ...], layers: int) -> list[Entry]:
    """Return the tensors of the VAE's levels; `ours` is (part, direction, resampling convolution)."""
    part, direction, resample = ours
    entries, previous = [], widths[0]
    for level, width in enumerate(widths):
        for index in range(layers):
            path = (part, f'{direction}_{level}_resnet_{index}')
            entries += _resnet(f'{source}.{level}.resnets.{index}', path, width != previous, embedded=False)
            previous = width
        if level + 1 < len(widths):
            entries += _conv(f'{source}.{level}.{resampler}.0.conv', (part, f'{direction}_{level}_{resample}'))
    return entries
