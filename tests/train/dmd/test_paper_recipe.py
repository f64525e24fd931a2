"""The default recipe is the paper's: two steps against arrays recorded before objectives became parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from support.goldens import load_golden, relative_error
from support.point_world import make_batch, point, point_program
from train.runtime.optimizer import OptimizerConfig


# The two kinds of clean prediction differ at stage 1 only.
@pytest.mark.parametrize(('kind', 'stage'), [('exact', 0), ('exact', 1), ('exact', 2), ('paper', 1)])
def test_two_steps_equal_the_recorded_ones(kind, stage):
    """Without compilation, and on the recording machine, the states are equal bit for bit (`np.array_equal`).

    Other processors round logarithms differently.
    """
    prefix = f'{kind}/stage{stage}/'
    want = {name[len(prefix) :]: array for name, array in load_golden('dmd_step').items() if name.startswith(prefix)}
    rate = OptimizerConfig(learning_rate=0.01, clip_norm=1.0)
    metrics = {}
    with jax.disable_jit():
        program = point_program(protocol='21', clean_prediction=kind, student=rate, fake=rate)
        state = program.init_state(jax.random.key(0), program.frozen()).replace(student=point(1), fake=point(2))
        batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), make_batch())
        for number in range(2):
            key = jax.random.fold_in(jax.random.key(7), number)
            state, metrics = program.train_step(stage, state, program.frozen(), batch, key)
    got = {'student': state.student['point'], 'fake': state.fake['point']}
    got |= {f'metrics/{name}': value for name, value in metrics.items()}
    assert want
    for name, array in want.items():
        assert relative_error(got[name], array) < 1e-6, name
