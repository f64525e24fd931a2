"""Tables for the host's computations around the graphs, for one checkpoint and one video size.

Values that depend only on unit, stage and step are precomputed here. A player only indexes, adds and multiplies.

Legend: L text tokens, D width, V vocabulary, h w a stage's latent grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers as tokenizers_library

from export.bundle.contents import Draft
from export.graphs.text import ClipHost
from export.host.denoiser_host import DenoiserHost
from export.host.graph_program import TextHost
from neodragon_jax.generation.tokens import CLIP_LENGTH
from neodragon_jax.models.t5 import MASKED
from neodragon_jax.models.vae import LOG_VARIANCE_RANGE, NEODRAGON
from neodragon_jax.pyramid.history import history_stage
from neodragon_jax.pyramid.sampler import Plan, Prompt

# Number of random text masks that the rule for padded text is checked on.
_CHECKED_MASKS = 4


def text_entries(draft: Draft, host: TextHost, text_tokens: int) -> dict[str, Any]:
    """Write tokenizers and embedding tables of the video's text encoders; return their part of the manifest."""
    tokens = host.tokenizers
    return {
        'clip_l': clip_entry(draft, 'clip_l', tokens.clip_l.backend, host.clip_l),
        'clip_g': clip_entry(draft, 'clip_g', tokens.clip_g.backend, host.clip_g),
        'dt5': {
            'tokenizer': write_tokenizer(draft, 'dt5', tokens.t5.backend, text_tokens),
            'tokens': text_tokens,
            'token_table': draft.table('dt5.tokens', host.t5.table),
            'padded_key': float(MASKED),
        },
    }


def clip_entry(draft: Draft, name: str, backend: Any, tower: ClipHost) -> dict[str, Any]:
    """Write tokenizer and tables of a CLIP tower; return its part of the manifest."""
    embedding = {part: tower.params[f'{part}_embedding']['embedding'] for part in ('token', 'position')}
    end = tower.tower.config.eos_token_id
    return {
        'tokenizer': write_tokenizer(draft, name, backend, CLIP_LENGTH),
        'tokens': CLIP_LENGTH,
        'token_table': draft.table(f'{name}.tokens', embedding['token']),
        'position_table': draft.table(f'{name}.positions', embedding['position'][:CLIP_LENGTH]),
        # Published configs that name token 2 mean the largest id, see `CLIPTextModel.end_of_text`.
        'end_of_text': {'rule': 'first largest id'} if end == 2 else {'rule': 'first of id', 'id': end},
    }


def write_tokenizer(draft: Draft, name: str, backend: Any, length: int) -> str:
    """Write a tokenizer file for the `tokenizers` library that pads and truncates to `length`; return its path."""
    tokenizer = tokenizers_library.Tokenizer.from_str(backend.backend_tokenizer.to_str())
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=backend.pad_token_id, pad_token=backend.pad_token)
    return draft.write(tokenizer.to_str().encode(), f'tokenizers/{name}.json')


def normalization_entry() -> dict[str, Any]:
    """Return the normalization of latents, (z - shift) scale, and the limits of the posterior's log-variance."""
    return dataclasses.asdict(NEODRAGON) | {'log_variance_range': list(LOG_VARIANCE_RANGE)}


def denoiser_entry(
    draft: Draft, host: DenoiserHost, plan: Plan, widths: Mapping[str, int], first_unit: int
) -> dict[str, Any]:
    """Write the tables of all units, stages and steps; return their part of the manifest.

    Args:
      host: host part of the denoiser; its modulation is not used.
      widths: `text_tokens`, `text` (width of the text states) and `pooled` (width of the pooled prompt).
      first_unit: first unit that the denoiser generates.
    """
    return {
        'patch': host.patch,
        'first_unit': first_unit,
        'gamma': plan.schedule.gamma,
        'guidance': plan.guidance,
        'first_guidance': plan.first_guidance,
        'stages': [_stage_entry(draft, host, plan, widths, stage, first_unit) for stage in range(plan.schedule.stages)],
    }


def _stage_entry(
    draft: Draft, host: DenoiserHost, plan: Plan, widths: Mapping[str, int], stage: int, first_unit: int
) -> dict[str, Any]:
    """Write the tables of one stage; return its part of the manifest."""
    schedule = plan.schedule
    coarser = schedule.stages - 1 - stage
    alpha, beta = schedule.upsample_coefficients(stage) if stage else (None, None)
    distances = range(plan.frames - 1, 0, -1)
    units = [
        _place_tables(draft, host, plan, widths, stage, unit) if unit >= first_unit else None
        for unit in range(plan.frames)
    ]
    return {
        'graph': f'denoiser_stage{stage}',
        'height': plan.height >> coarser,
        'width': plan.width >> coarser,
        'enter': {'alpha': alpha, 'beta': beta} if stage else None,
        'history': [{'distance': distance, 'stage': history_stage(stage, distance)} for distance in distances],
        'first_unit_steps': _step_entries(draft, host, plan, widths, stage, plan.first_steps[stage]),
        'steps': _step_entries(draft, host, plan, widths, stage, plan.steps[stage]),
        'units': units,
    }


def _step_entries(
    draft: Draft, host: DenoiserHost, plan: Plan, widths: Mapping[str, int], stage: int, count: int
) -> list[dict[str, Any]]:
    """Return timestep, levels and sinusoid of each Euler step."""
    timesteps, local = plan.schedule.steps(stage, count)
    entries = []
    for step, timestep in enumerate(timesteps):
        name = f'denoiser.sinusoid.stage{stage}.step{step + 1}of{count}'
        if name not in draft.tables:
            inputs = host.modulation_inputs(_prompt(widths), jnp.full(1, timestep, jnp.float32))
            draft.table(name, inputs['timestep'])
        entry = {
            'timestep': float(np.float32(timestep)),
            'level': float(local[step]),
            'next_level': float(local[step + 1]),
            'sigma': float(plan.schedule.sigma(stage, jnp.float32(local[step]))),
            'sinusoid': name,
        }
        entries.append(entry)
    return entries


def _place_tables(
    draft: Draft, host: DenoiserHost, plan: Plan, widths: Mapping[str, int], stage: int, unit: int
) -> dict[str, Any]:
    """Write the rotary embedding and attention bias of a unit; return the table of each input.

    An input that depends on the text mask has two tables: row j (axis 1) comes from `padded` where token j is padding.
    """
    tokens = widths['text_tokens']
    place = lambda mask: _place(host, plan, widths, stage, unit, mask)
    valid, padded = place(np.ones(tokens, np.int32)), place(np.zeros(tokens, np.int32))
    entries = {}
    for name, array in valid.items():
        path = f'denoiser.{name}.stage{stage}.unit{unit}'
        entries[name] = {'table': draft.table(path, array)}
        if not np.array_equal(array, padded[name]):
            entries[name]['padded'] = draft.table(f'{path}.padded', padded[name])
    for mask in np.random.default_rng(0).integers(0, 2, (_CHECKED_MASKS, tokens)).astype(np.int32):
        for name, array in place(mask).items():
            assert np.array_equal(array, choose_rows(valid[name], padded[name], mask)), name
    return entries


def choose_rows(valid: np.ndarray, padded: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return `valid` with the rows (axis 1) of padding tokens replaced by those of `padded`."""
    chosen = valid.copy()
    rows = np.flatnonzero(mask == 0)
    if valid.ndim > 1 and not np.array_equal(valid, padded):
        chosen[:, rows] = padded[:, rows]
    return chosen


def _place(
    host: DenoiserHost, plan: Plan, widths: Mapping[str, int], stage: int, unit: int, mask: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the inputs of a stage's graph that depend only on the position in the video and the text mask."""
    size = lambda at: (plan.height >> (plan.schedule.stages - 1 - at), plan.width >> (plan.schedule.stages - 1 - at))
    clip = lambda at: jnp.zeros((1, 1, *size(at), plan.channels))
    past = [clip(history_stage(stage, distance)) for distance in range(plan.frames - 1, 0, -1)]
    prompt = _prompt(widths)._replace(mask=jnp.asarray(mask)[None])
    inputs = host.stage_inputs(past, clip(stage), jnp.full(1, unit, jnp.int32), prompt, jnp.zeros(1))
    return {name: inputs[name] for name in inputs if name.startswith(PLACE_PREFIXES)}


# Prefixes of the names of inputs that come from tables.
PLACE_PREFIXES: tuple[str, ...] = ('rotary', 'bias')


def _prompt(widths: Mapping[str, int]) -> Prompt:
    """Return a prompt of zeros."""
    tokens: Sequence[int] = (1, widths['text_tokens'])
    return Prompt(jnp.zeros((*tokens, widths['text'])), jnp.ones(tokens, jnp.int32), jnp.zeros((1, widths['pooled'])))
