"""Tests of the schedule against the reference's tables."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.schedule import Schedule, euler_step
from support.goldens import load_golden, relative_error


@pytest.fixture(scope='module')
def golden() -> dict[str, np.ndarray]:
    return load_golden('scheduler')


@pytest.mark.parametrize(
    ('name', 'attribute'),
    [
        ('start_sigmas', 'start_sigmas'),
        ('end_sigmas', 'end_sigmas'),
        ('timestep_ratios', 'timestep_ratios'),
        ('timesteps_per_stage', 'train_timesteps'),
    ],
)
def test_tables(golden, name, attribute):
    assert relative_error(getattr(Schedule(), attribute), golden[f'f64/v0/{name}']) < 1e-6


def test_original_sigmas_and_levels(golden):
    schedule = Schedule()
    original = np.append(1.0, schedule.end_sigmas[:-1])
    assert relative_error(original, golden['f64/v0/orig_start_sigmas']) < 1e-6
    for stage in range(3):
        assert relative_error(schedule.train_levels, golden['f64/v0/sigmas_per_stage'][stage]) < 1e-6


def test_range_of_a_stage_in_timesteps(golden):
    first, last = Schedule().train_timesteps[:, 0], Schedule().train_timesteps[:, -1]
    assert relative_error(first - last, golden['f64/v0/timestep_per_stage_range']) < 1e-6


def test_upsample_coefficients(golden):
    pairs = np.array([Schedule().upsample_coefficients(stage) for stage in (1, 2)])
    assert relative_error(pairs[:, 0], golden['f64/v0/upsample_alpha_stage1plus']) < 1e-6
    assert relative_error(pairs[:, 1], golden['f64/v0/upsample_beta_stage1plus']) < 1e-6


def test_inference_steps(golden):
    counts = sorted({int(key.split('/')[2][1:]) for key in golden if key.startswith('f64/v0/n') and '/s0/' in key})
    assert counts[0] == 1 and len(counts) > 3
    for count in counts:
        for stage in range(3):
            steps = Schedule().steps(stage, count)
            assert relative_error(steps.timesteps, golden[f'f64/v0/n{count}/s{stage}/timesteps']) < 1e-6
            assert relative_error(steps.levels, golden[f'f64/v0/n{count}/s{stage}/sigmas']) < 1e-6
            # The denoiser takes float32; the reference in bfloat16 takes the same numbers, rounded.
            rounded = np.float32(jnp.asarray(steps.timesteps, jnp.bfloat16))
            np.testing.assert_array_equal(rounded, golden[f'v0/n{count}/s{stage}/timesteps_bf16'])


def test_continuous_timestep_passes_through_the_training_table():
    schedule = Schedule()
    for stage in range(3):
        got = schedule.timestep(stage, jnp.asarray(schedule.train_levels))
        np.testing.assert_allclose(got, schedule.train_timesteps[stage], rtol=1e-6)


def test_sigma_ends_at_the_stage_limits():
    schedule = Schedule()
    for stage in range(3):
        got = schedule.sigma(stage, jnp.array([1.0, 0.0]))
        np.testing.assert_allclose(got, [schedule.start_sigmas[stage], schedule.end_sigmas[stage]], rtol=1e-6)


# The reference in bfloat16 also rounds the product of step and flow; ours rounds the result only.
@pytest.mark.parametrize(
    ('dtype', 'wanted', 'tolerance'), [(jnp.float32, 'prev_sample', 1e-6), (jnp.bfloat16, 'prev_sample_bf16', 2**-8)]
)
def test_euler_step(golden, dtype, wanted, tolerance):
    names = sorted(key for key in golden if key.startswith('step') and key.endswith(f'/{wanted}'))
    assert names
    for name in names:
        case = name.rsplit('/', 1)[0]
        x, flow = (jnp.asarray(golden[f'{case}/{key}'], dtype) for key in ('sample', 'model_output'))
        got = euler_step(x, flow, *golden[f'{case}/sigma'])
        assert got.dtype == jnp.float32
        assert relative_error(got.astype(dtype), golden[name]) < tolerance


@pytest.mark.parametrize('count', [0, -1, 1001])
def test_unsupported_step_counts(count):
    with pytest.raises(InputError, match=f'{count} steps'):
        Schedule().steps(0, count)


@pytest.mark.parametrize('gamma', [0.0, 0.5])
def test_impossible_correlation(gamma):
    with pytest.raises(InputError, match='gamma'):
        Schedule(gamma=gamma)
