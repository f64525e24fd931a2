"""Descriptions of the graphs of a bundle: their order, and the meaning of their inputs and outputs.

The `source` of an input is `host` (computed as described in docs/bundle.md), `table` (indexed by unit and stage), or
`GRAPH.OUTPUT`.
"""

from __future__ import annotations

import fnmatch
from typing import NamedTuple

# Phases in order. The graphs of a phase are in memory together; no phase needs a graph of another phase.
PHASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ('text', ('clip_l', 'clip_g', 'dt5', 'context_adapter')),
    ('picture text', ('first_frame_clip_l', 'first_frame_clip_g')),
    ('picture', ('first_frame_unet',)),
    ('picture decoding', ('first_frame_decoder',)),
    ('first frame', ('video_encoder',)),
    ('modulation', ('denoiser_modulation',)),
    ('denoising', ('denoiser_stage0', 'denoiser_stage1', 'denoiser_stage2')),
    ('decoding', ('video_decoder', 'super_resolution')),
)


class Meaning(NamedTuple):
    """Source and description of an input, or description of an output."""

    source: str
    text: str


# The first pattern that matches GRAPH.INPUT applies.
_INPUTS: tuple[tuple[str, Meaning], ...] = (
    ('*clip_[lg].embeddings', Meaning('host', 'token_table[ids] + position_table')),
    ('*clip_[lg].end', Meaning('host', '1 at the end-of-text token, else 0')),
    ('dt5.embeddings', Meaning('host', 'token_table[ids]; the table is already divided by 16')),
    ('dt5.keys', Meaning('host', '0 at tokens, padded_key at padding')),
    ('context_adapter.states', Meaning('dt5.states', 'states of the T5 encoder')),
    ('first_frame_unet.latent', Meaning('host', 'noisy latents of the picture')),
    ('first_frame_unet.text', Meaning('host', 'states of first_frame_clip_l, then of first_frame_clip_g, per token')),
    ('first_frame_unet.embedding', Meaning('host', 'embedding of the step and of the pooled text')),
    ('first_frame_decoder.latent', Meaning('host', 'latents of the picture / scaling_factor')),
    ('video_encoder.picture', Meaning('host', 'first frame, RGB in [-1, 1]')),
    ('denoiser_modulation.timestep', Meaning('table', 'sinusoid of the timestep')),
    ('denoiser_modulation.pooled', Meaning('host', 'pooled of clip_l, then pooled of clip_g')),
    ('denoiser_stage?.patches', Meaning('host', 'patches of history and current unit, oldest first')),
    ('denoiser_stage?.text', Meaning('context_adapter.text', 'text states')),
    ('denoiser_stage?.rotary*', Meaning('table', 'rotary embedding of unit and stage')),
    ('denoiser_stage?.bias*', Meaning('table', 'attention bias of unit, stage and text mask')),
    ('denoiser_stage?.*', Meaning('denoiser_modulation.{input}', 'modulation of the step')),
    ('video_decoder.latent', Meaning('host', 'latent frame, de-normalized')),
    ('video_decoder.memory_*', Meaning('host', 'zeros, then next_memory of the frame before')),
    ('super_resolution.frame', Meaning('host', 'RGB bytes of the decoder / 255')),
)
_OUTPUTS: tuple[tuple[str, str], ...] = (
    ('*.pooled', 'projected state of the end-of-text token'),
    ('*.states', 'states of the tokens'),
    ('context_adapter.text', 'text states of the denoiser'),
    ('first_frame_unet.noise', 'noise in the latents'),
    ('first_frame_decoder.picture', 'RGB in [-1, 1]'),
    ('video_encoder.mean', 'mean of the latent distribution'),
    ('video_encoder.log_variance', 'log-variance of the latent distribution'),
    ('denoiser_modulation.*', 'modulation vector'),
    ('denoiser_stage?.flow', 'flow of the patches of the current unit'),
    ('video_decoder.frames', 'eight frames, RGB in [-1, 1]; the first seven of a video are dropped'),
    ('video_decoder.next_memory_*', 'memory for the next latent frame'),
    ('super_resolution.enlarged', 'RGB in [0, 1]'),
)


def input_meaning(graph: str, name: str) -> Meaning:
    """Return the source and description of a graph's input."""
    for pattern, meaning in _INPUTS:
        if fnmatch.fnmatch(f'{graph}.{name}', pattern):
            return Meaning(meaning.source.format(input=name), meaning.text)
    raise KeyError(f'{graph}.{name}')


def output_meaning(graph: str, name: str) -> str:
    """Return the description of a graph's output."""
    return next(text for pattern, text in _OUTPUTS if fnmatch.fnmatch(f'{graph}.{name}', pattern))
