"""The average of the student, and batches in parts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from support.goldens import relative_error
from support.point_world import make_batch, point, point_program
from train.dmd.state import AverageConfig, follow
from train.runtime.optimizer import OptimizerConfig

RATE = OptimizerConfig(learning_rate=0.01)


def steps(count: int, **options):
    """Return the states after each of several steps at stage 1."""
    program = point_program(student=RATE, fake=RATE, **options)
    state = program.init_state(jax.random.key(0), program.frozen())
    state = state.replace(student=point(1), fake=point(2), average=None if state.average is None else point(1))
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * program.config.updates), make_batch())
    step, states = jax.jit(functools.partial(program.train_step, 1)), []
    for number in range(count):
        state, _ = step(state, program.frozen(), batch, jax.random.key(number))
        state = state.replace(step=state.step + 1)
        states.append(state)
    return states


def test_the_average_follows_the_student_from_its_start_on():
    states = steps(4, average=AverageConfig(decay=0.9, start=2))
    students = [np.asarray(state.student['point'], np.float64) for state in states]
    assert all(np.array_equal(state.average['point'], state.student['point']) for state in states[:2])
    want = students[1]
    for student, state in zip(students[2:], states[2:], strict=True):
        want = 0.9 * want + 0.1 * student
        assert relative_error(state.average['point'], want) < 1e-6
    assert np.array_equal(states[3].result['point'], states[3].average['point'])
    assert not np.array_equal(states[3].result['point'], states[3].student['point'])


def test_the_average_keeps_constants_bit_for_bit():
    constant = {'positions': jax.random.normal(jax.random.key(0), (100,))}
    average = follow(constant, constant, jnp.int32(9), AverageConfig(decay=0.99, start=0))
    assert np.array_equal(average['positions'], constant['positions'])


def test_without_an_average_the_student_is_the_result():
    (state,) = steps(1, average=AverageConfig(decay=0.0))
    assert state.average is None
    assert state.result is state.student


def test_parts_of_a_batch_make_the_step_of_the_whole():
    """All random numbers travel with their rows."""
    (whole,), (parts,) = steps(1), steps(1, accumulate=4)
    # The tolerance is relative to the updates, which are small compared with the parameters.
    for name, start in (('student', point(1)), ('fake', point(2))):
        moved = [np.asarray(getattr(state, name)['point'] - start['point']) for state in (whole, parts)]
        assert np.any(moved[0])
        assert relative_error(moved[1], moved[0]) < 1e-3, name


@pytest.mark.parametrize('values', [{'decay': 1.0}, {'decay': -0.1}, {'start': -1}])
def test_impossible_averages_are_refused(values):
    with pytest.raises(InputError, match=rf'^{next(iter(values))} is .* it must be at least 0'):
        AverageConfig(**values)
