"""The default recipe is the paper's: two steps against arrays recorded before objectives became parts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from support.goldens import load_golden, relative_error
from support.point_world import make_batch, point, point_program
from train.runtime.optimizer import OptimizerConfig
from train.runtime.sharding import to_host


@pytest.mark.parametrize('stage', range(3))
@pytest.mark.parametrize('kind', ['exact', 'paper'])
def test_two_steps_equal_the_recorded_ones(kind, stage):
    """On the machine that recorded them the states are equal bit for bit; others may round differently."""
    prefix = f'{kind}/stage{stage}/'
    want = {name[len(prefix) :]: array for name, array in load_golden('dmd_step').items() if name.startswith(prefix)}
    rate = OptimizerConfig(learning_rate=0.01, clip_norm=1.0)
    program = point_program(protocol='21', clean_prediction=kind, student=rate, fake=rate)
    state = program.init_state(jax.random.key(0), program.frozen()).replace(student=point(1), fake=point(2))
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), make_batch())
    step = jax.jit(functools.partial(program.train_step, stage))
    metrics = {}
    for number in range(2):
        state, metrics = to_host(step(state, program.frozen(), batch, jax.random.fold_in(jax.random.key(7), number)))
    got = {'student': state.student['point'], 'fake': state.fake['point']}
    got |= {f'metrics/{name}': value for name, value in metrics.items()}
    assert want
    for name, array in want.items():
        assert relative_error(got[name], array) < 1e-6, name
