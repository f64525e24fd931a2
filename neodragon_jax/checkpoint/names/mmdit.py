"""Rename tables of PyramidMMDiT, alone and as part of the teacher."""

from __future__ import annotations

import numpy as np

from neodragon_jax.checkpoint.names.convert import LINEAR, SAME, Convert, Entry, chain, dense, permuted, reshaped
from neodragon_jax.config.neodragon import MMDiTConfig

# Released projection -> Flax projection; queries and keys are permuted to half-split rotary order.
_PROJECTIONS = {
    'to_q': 'image_query',
    'to_k': 'image_key',
    'to_v': 'image_value',
    'add_q_proj': 'text_query',
    'add_k_proj': 'text_key',
    'add_v_proj': 'text_value',
}
_NORMS = {'norm_q': 'image_query', 'norm_k': 'image_key', 'norm_add_q': 'text_query', 'norm_add_k': 'text_key'}


def half_split_order(heads: int, head_dim: int) -> np.ndarray:
    """Return the released index of each Flax row: per head first the even dimensions, then the odd ones."""
    one_head = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
    return (np.arange(heads)[:, None] * head_dim + one_head).reshape(-1)


def mmdit_names(config: MMDiTConfig) -> list[Entry]:
    """Return every released tensor of the denoiser with its path in the (unrolled) Flax tree."""
    width, size, patch = config.width, config.pos_embed_max_size, config.patch_size
    conv = Convert(
        lambda x: x.transpose(2, 3, 1, 0).reshape(config.patch_dim, width),
        lambda x: x.reshape(patch, patch, config.in_channels, width).transpose(3, 2, 0, 1),
    )
    entries = [
        Entry('pos_embed.pos_embed', ('positions',), reshaped((1, size * size, width), (size, size, width))),
        *dense('pos_embed.proj', ('patch_embed',), weight=conv),
        *dense('proj_out', ('head',)),
        *_modulation('norm_out.linear', ('head_modulator', 'linear'), 2, width),
    ]
    for ours, theirs in (('time_embed', 'timestep_embedder'), ('pooled_embed', 'text_embedder')):
        for layer in ('linear_1', 'linear_2'):
            entries += dense(f'time_text_embed.{theirs}.{layer}', (ours, layer))
    for index in range(config.num_layers):
        entries += _block(config, index)
    return entries


def teacher_names(config: MMDiTConfig) -> list[Entry]:
    """Return every tensor of Pyramid-Flow's PyramidDiffusionMMDiT: the denoiser's, and the context embedder's."""
    denoiser = [entry._replace(path=('denoiser', *entry.path)) for entry in mmdit_names(config)]
    return dense('context_embedder', ('context_embedder',)) + denoiser


def _block(config: MMDiTConfig, index: int) -> list[Entry]:
    """Return the tensors of one block and of its modulation."""
    last = index == config.num_layers - 1
    source = f'transformer_blocks.{index}'
    block, modulator = ('last_block', 'last_modulator') if last else (f'blocks_{index}', f'modulators_{index}')
    rows = permuted(half_split_order(config.num_attention_heads, config.attention_head_dim), axis=0)
    row = permuted(half_split_order(1, config.attention_head_dim), axis=0)

    entries = []
    for theirs, ours in _PROJECTIONS.items():
        weight, bias = (LINEAR, SAME) if ours.endswith('value') else (chain(rows, LINEAR), rows)
        entries += [
            Entry(f'{source}.attn.{theirs}.weight', (block, ours, 'kernel'), weight),
            Entry(f'{source}.attn.{theirs}.bias', (block, ours, 'bias'), bias),
        ]
    for theirs, ours in _NORMS.items():
        entries.append(Entry(f'{source}.attn.{theirs}.weight', (block, f'{ours}_norm', 'scale'), row))
    streams = [('image', 'attn.to_out.0', 'ff', 'norm1')]
    if not last:
        streams.append(('text', 'attn.to_add_out', 'ff_context', 'norm1_context'))
    for ours, out, mlp, modulation in streams:
        entries += dense(f'{source}.{out}', (block, f'{ours}_out'))
        entries += dense(f'{source}.{mlp}.net.0.proj', (block, f'{ours}_mlp', 'linear_1'))
        entries += dense(f'{source}.{mlp}.net.2', (block, f'{ours}_mlp', 'linear_2'))
        entries += _modulation(f'{source}.{modulation}.linear', (modulator, ours, 'linear'), 6, config.width)
    if last:
        # The last text stream ends in attention: its norm has two vectors, and no output or MLP follows.
        entries += _modulation(f'{source}.norm1_context.linear', (modulator, 'text', 'linear'), 2, config.width)
    return entries


def _modulation(source: str, path: tuple[str, ...], parts: int, width: int) -> list[Entry]:
    """Return a modulation linear: released [parts * D, D], Flax [D, parts, D]."""
    kernel = chain(LINEAR, reshaped((width, parts * width), (width, parts, width)))
    return [
        Entry(f'{source}.weight', (*path, 'kernel'), kernel),
        Entry(f'{source}.bias', (*path, 'bias'), reshaped((parts * width,), (parts, width))),
    ]
