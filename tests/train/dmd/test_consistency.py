"""The consistency objective: the target against finite differences, its fixed point, its gradient in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from support.goldens import relative_error
from support.point_world import BATCH, make_batch, point, point_program
from train.dmd.objectives.consistency import Consistency, ConsistencyConfig, mean_flow_target
from train.dmd.objectives.matching import MatchingConfig
from train.dmd.objectives.objective import Models
from train.dmd.objectives.regression import RegressionConfig
from train.dmd.objectives.weighted import ObjectivesConfig
from train.dmd.own_history import OwnHistoryConfig
from train.flow import losses

OBJECTIVES = ObjectivesConfig(
    MatchingConfig(weight=0.0), RegressionConfig(weight=0.0), consistency=ConsistencyConfig(1.0)
)


def flow(x, level):
    return jnp.sin(3 * x + losses.per_sample(level, x) ** 2)


def test_target_against_finite_differences():
    rng = np.random.default_rng(0)
    x, velocity = (rng.standard_normal((3, 1, 4, 4, 2)) for _ in range(2))
    level = np.asarray([0.2, 0.7, 1.0])
    got = mean_flow_target(flow, *(jnp.asarray(array, jnp.float32) for array in (x, level, velocity)))
    column, step = level.reshape(-1, 1, 1, 1, 1), 1e-6
    u = lambda shift: np.sin(3 * (x + shift * velocity) + (column + shift) ** 2)
    want = velocity - column * (u(step) - u(-step)) / (2 * step)
    assert relative_error(got, want) < 1e-5


def test_it_is_a_mean():
    """Where dx = v dlevel and u = (x(level) - x(0)) / level, the target is u itself."""
    level = jnp.asarray([0.3, 0.9])
    # x(level) = x(0) exp(level), so v = x, and u = x (1 - exp(-level)) / level.
    mean = lambda x, level: x * (1 - jnp.exp(-losses.per_sample(level, x))) / losses.per_sample(level, x)
    x = jax.random.normal(jax.random.key(0), (2, 1, 2, 2, 3))
    assert relative_error(mean_flow_target(mean, x, level, x), mean(x, level)) < 1e-5


@pytest.mark.parametrize('stage', range(3))
def test_pull_of_a_student_that_is_or_is_not_the_teacher(stage):
    program = point_program(objectives=OBJECTIVES, levels='uniform', protocol='21')
    batch = make_batch()
    draws = program.examples.draw(jax.random.key(1), stage, batch['latents'].shape)
    assert len(set(np.asarray(draws['level']).tolist())) == BATCH
    example = program.examples.build(stage, batch, draws)
    part, denoiser = Consistency(OBJECTIVES.consistency), program.updates.denoiser
    gradients = []
    # The flow to another point would meet its own target at the last stage: it is consistent, but not the teacher's.
    curved = lambda stage, history, x, unit, prompt, timestep: jnp.sin(x)
    for student in (denoiser(point(0)), curved):
        models = Models(student=student, fake=denoiser(point(5)), teacher=denoiser(point(0)))
        z_theta = program.examples.predict(models.student, stage, example)
        gradients.append(part.gradient(program.examples, stage, example, z_theta, models, {}))
    # The flow of one point is straight: the teacher is its own mean.
    assert float(jnp.max(gradients[0][1]['consistency_mse'])) < 1e-6
    assert float(jnp.min(gradients[1][1]['consistency_mse'])) > 1e-2
    assert np.all(np.isfinite(gradients[1][0])) and np.any(gradients[1][0])


def test_it_takes_part_in_a_step():
    program = point_program(objectives=OBJECTIVES, levels='uniform')
    assert [part.name for part in program.updates.parts] == ['consistency']
    batch = make_batch()
    shape, key = batch['latents'].shape, jax.random.key(2)
    rows = batch | program.examples.draw(key, 1, shape) | program.updates.draw_student(1, shape, key)
    loss = lambda student: program.updates.student_loss(1, 0, (point(2), {}), program.frozen(), student, rows)
    gradient, sums = jax.grad(loss, has_aux=True)(point(1))
    assert np.any(gradient['point'])
    assert 'consistency_mse' in sums


def test_arrivals_at_the_student_s_steps_are_refused():
    with pytest.raises(InputError, match=r'set own_history\.arrive to False'):
        point_program(levels='uniform', own_history=OwnHistoryConfig(last=1.0))
