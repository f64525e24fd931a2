"""Training of the teacher on samples of four patterns: settings, programs and steps."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import teacher as teacher_settings
from neodragon_jax.pyramid.schedule import Schedule
from train.data import ArraySpec, RecordSpec, SampleSource, SampleWriter
from train.runtime.settings import freeze
from train.runtime.sharding import AXES, make_mesh, put
from train.runtime.step import abstract_arguments, initial, jit_step
from train.teacher import program as teacher

SCHEDULE = Schedule()
FRAMES, GRID, CHANNELS, TOKENS, TEXT, POOLED, KINDS = 2, 8, 4, 3, 12, 6, 4
BATCH = 8
# The stages of its first four steps are 0 0 0 0, so that a run compiles one step.
SEED = 41
SIZES = {
    'num_layers': 2,
    'num_attention_heads': 2,
    'attention_head_dim': 16,
    'caption_projection_dim': 32,
    'joint_attention_dim': TEXT,
    'pooled_projection_dim': POOLED,
    'in_channels': CHANNELS,
    'sample_size': GRID,
    'pos_embed_max_size': GRID,
}
EVALUATION = {'examples': 8, 'batch': 8, 'samples': 2}


def record(rng: np.random.Generator, kind: int, image: bool) -> dict[str, Any]:
    """Return a sample whose caption names its pattern; the second frame is the first one flipped."""
    pattern = np.random.default_rng(kind).standard_normal((2, 2, CHANNELS))
    first = np.repeat(np.repeat(pattern, GRID // 2, 0), GRID // 2, 1) + 0.1 * rng.standard_normal(
        (GRID, GRID, CHANNELS)
    )
    second = np.zeros_like(first) if image else -first
    text = np.zeros((TOKENS, TEXT))
    text[:, kind] = 1
    return {
        'latents': np.stack([first, second]).astype(np.float32),
        'units': np.int32(1 if image else 2),
        't5': text.astype(np.float32),
        'text_mask': np.asarray([1, 1, 0], np.int32),
        'pooled': text[0, :POOLED].astype(np.float32),
    }


def write(folder, samples: list[dict[str, Any]]) -> None:
    """Write samples as train.latents does."""
    arrays = {name: ArraySpec(value.shape, str(value.dtype)) for name, value in samples[0].items()}
    with SampleWriter(folder, RecordSpec(arrays), len(samples), protocol={'world': 'patterns'}) as writer:
        nothing = {name: np.zeros_like(samples[0][name]) for name in ('t5', 'pooled')}
        writer.write_conditioning('null', nothing | {'text_mask': np.asarray([1, 0, 0], np.int32)})
        for index in writer.missing():
            writer.append(samples[index] | {'index': index, 'prompt': f'sample {index}'})


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> str:
    """A folder of 40 samples, every third one an image."""
    folder, rng = tmp_path_factory.mktemp('teacher') / 'latents', np.random.default_rng(0)
    write(folder, [record(rng, index % KINDS, index % 3 == 0) for index in range(40)])
    return str(folder)


def settings(data: str, workdir='unused', steps: int = 1, mesh=(8, 1, 1), embedder: bool = True, **changes):
    config = teacher_settings.get_config('tiny')
    objective = {'sizes': SIZES, 'context_embedder': embedder, 'stages': 'one', 'evaluation': EVALUATION}
    objective |= {'optimizer': {'learning_rate': 4e-3}}
    run = {'steps': steps, 'batch_size': BATCH, 'mesh': dict(zip(AXES, mesh, strict=True)), 'log_every': 1}
    run |= {'checkpoint_every': 100, 'evaluate_every': 0}
    config.update({'data': data, 'seed': SEED, 'workdir': str(workdir), 'teacher': objective, 'loop': run})
    config.update(changes)
    return config


@functools.cache
def program_for(data: str, **options) -> teacher.TeacherTraining:
    values = settings(data).teacher.to_dict() | options
    return teacher.load_program(freeze(teacher.TeacherConfig, values), [data], [1.0])[0]


def raw_batch(data: str) -> dict[str, np.ndarray]:
    """Return the first samples as the loader gives them."""
    rows = [SampleSource(data)[index] for index in range(BATCH)]
    return {name: np.stack([row[name] for row in rows]) for name in (*rows[0].keys() - {'prompt'},)}


def example_batch(data: str) -> dict[str, jax.Array]:
    """Return them as the objective takes them."""
    batch = raw_batch(data)
    arrays = {name: batch[name] for name in ('latents', 'units')} | program_for(data).prompts(batch)
    return jax.tree.map(jnp.asarray, arrays)


def placed_step(data: str, mesh_sizes: tuple[int, int, int], stages: tuple[int, ...]):
    """Return (step, first carry, batch, key) on a mesh."""
    program, source, run = teacher.load(teacher.RECIPE.read(settings(data, mesh=mesh_sizes)))
    abstract = abstract_arguments(program, {}, source, run, make_mesh(run.mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    begin = jax.jit(functools.partial(initial, program), out_shardings=shardings.carry)
    raw = raw_batch(data) | {'source': np.zeros(BATCH, np.int32)}
    batch = put({name: raw[name] for name in abstract.batch}, shardings.batch)
    key = jax.device_put(jax.random.key(1), shardings.root_key)
    return jit_step(program, stages, abstract), functools.partial(begin, jax.random.key(0), {}), batch, key
