"""Objectives: golden arrays of the teacher's objective, and identities of the distillation's."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.models.vae import PYRAMID_FLOW, normalize
from neodragon_jax.pyramid.schedule import Schedule
from neodragon_jax.pyramid.stages import down, down_noise, levels, stage_pair, up
from support.goldens import GOLDENS, channels_last, load_golden, relative_error
from train.flow import losses

SCHEDULE = Schedule()
STAGES = range(SCHEDULE.stages)
CONFIG = json.loads((GOLDENS / 'pf_training' / 'config.json').read_text())
TOLERANCE = 2e-5


@pytest.fixture(scope='module')
def golden() -> dict[str, np.ndarray]:
    return load_golden('pf_training')


def column_of(array: np.ndarray, column: int, columns: int) -> jnp.ndarray:
    """Return the rows of a column (row r is column r % columns), channels last."""
    return jnp.asarray(channels_last(array)[column::columns])


def draw_level(golden: dict[str, np.ndarray], name: str, column: int) -> jnp.ndarray:
    """Return the local level that a uniform draw selects on the 1000-step grid."""
    return jnp.asarray(SCHEDULE.train_levels[np.floor(1000 * golden[f'{name}/draw/col{column}_u']).astype(int)])


def stage_latents(shape=(3, 1, 8, 12, 5), seed=0) -> tuple[jnp.ndarray, jnp.ndarray]:
    clean, noise = np.random.default_rng(seed).standard_normal((2, *shape)).astype(np.float32)
    return jnp.asarray(clean), jnp.asarray(noise)


@pytest.mark.parametrize('name', list(CONFIG))
def test_flow_between_stages_matches_teacher_objective(golden, name):
    case = CONFIG[name]
    stages = case['column_to_stage']
    for column, stage in enumerate(stages):
        clean = column_of(golden[f'{name}/pyramid_level{stage}'], column, len(stages))
        noise = column_of(golden[f'{name}/draw/noise_fullres'], column, len(stages))
        clips = [clip for clip in golden if clip.startswith(f'{name}/out/col{column}_clip')]
        want = {
            'x': channels_last(golden[f'{name}/out/col{column}_clip{len(clips) - 1}']),
            'target': channels_last(golden[f'{name}/out/col{column}_target']),
        }
        # The trained unit is the last of the column; its first unit is frame 0 alone.
        last = 1 + (case['units_low_mid_high'][stage] - 1) * case['frames_per_unit']
        frames = slice(last - want['x'].shape[1], last)
        noise = down_noise(noise[:, frames], SCHEDULE.stages - 1 - stage)
        start, end = stage_pair(clean[:, frames], noise, stage, SCHEDULE)
        level = draw_level(golden, name, column)

        assert relative_error(losses.interpolate(start, end, level), want['x']) < TOLERANCE
        assert relative_error(start - end, want['target']) < TOLERANCE
        assert relative_error(level, golden[f'{name}/out/col{column}_ratio'].reshape(-1)) < 1e-6
        timestep = SCHEDULE.timestep(stage, level)
        assert relative_error(timestep, golden[f'{name}/out/col{column}_timestep']) < 1e-6
        assert relative_error(timestep, golden[f'{name}/out/timesteps_rowmajor'][column :: len(stages)]) < 1e-6


@pytest.mark.parametrize('name', list(CONFIG))
def test_scaled_latents_and_their_levels_match_the_teacher_objective(golden, name):
    raw = jnp.asarray(channels_last(golden[f'{name}/in/vae_latents_raw']))
    for level, got in enumerate(levels(normalize(raw, statistics=PYRAMID_FLOW), SCHEDULE.stages)):
        assert relative_error(got, channels_last(golden[f'{name}/pyramid_level{level}'])) < TOLERANCE


@pytest.mark.parametrize('name', ['sp0', 'sp1'])
def test_flow_of_the_spatial_pyramid_alone(golden, name):
    raw = jnp.asarray(channels_last(golden[f'{name}/in/vae_latents_raw']))
    # Pyramid-Flow's own latent scales, which Neodragon changed.
    clean = normalize(raw, statistics=PYRAMID_FLOW)
    noise = jnp.asarray(channels_last(golden[f'{name}/draw/noise_fullres']))
    pyramid = levels(clean, SCHEDULE.stages)
    for stage in STAGES:
        rows = slice(stage, None, SCHEDULE.stages)
        pair = stage_pair(pyramid[stage][rows], down_noise(noise[rows], 2 - stage), stage, SCHEDULE)
        level = draw_level(golden, name, stage)
        assert relative_error(level, golden[f'{name}/out/col{stage}_ratio'].reshape(-1)) < 1e-6
        assert relative_error(SCHEDULE.timestep(stage, level), golden[f'{name}/out/col{stage}_timestep']) < 1e-6
        got = losses.interpolate(*pair, level)
        assert relative_error(got, channels_last(golden[f'{name}/out/col{stage}_noisy'])) < TOLERANCE
        assert relative_error(pair[0] - pair[1], channels_last(golden[f'{name}/out/col{stage}_target'])) < TOLERANCE


@pytest.mark.parametrize('name', list(CONFIG))
def test_history_corruption_matches_teacher_objective(golden, name):
    case = CONFIG[name]
    columns = len(case['column_to_stage'])
    checked = 0
    for column, stage in enumerate(case['column_to_stage']):
        clips = len([clip for clip in golden if clip.startswith(f'{name}/out/col{column}_clip')])
        amount = jnp.asarray(golden[f'{name}/draw/col{column}_cond_sigma_raw']) * case['corrupt_ratio']
        end = 1 + (case['units_low_mid_high'][stage] - 2) * case['frames_per_unit']
        for distance in range(1, clips):
            want = channels_last(golden[f'{name}/out/col{column}_clip{clips - 1 - distance}'])
            level = max(stage - (distance - 1), 0)
            clean = column_of(golden[f'{name}/pyramid_level{level}'], column, columns)[:, end - want.shape[1] : end]
            drawn = golden[f'{name}/draw/col{column}_cond_noise{distance - 1}_from_most_recent']
            got = losses.corrupt(clean, jnp.asarray(channels_last(drawn)), amount)
            assert relative_error(got, want) < TOLERANCE
            end -= want.shape[1]
            checked += 1
    # tp0 trains the first unit only, which has no history.
    assert checked or name == 'tp0'


@pytest.mark.parametrize('name', list(CONFIG))
def test_flow_matching_loss_matches_teacher_objective(golden, name):
    errors = [
        losses.squared_error(golden[f'{name}/loss/pred_col{column}'], golden[f'{name}/out/col{column}_target'])
        for column in range(len(CONFIG[name]['column_to_stage']))
    ]
    assert relative_error(np.mean(errors), golden[f'{name}/loss/value']) < TOLERANCE


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('level', [0.0, 0.001, 0.37, 1.0])
def test_true_flow_gives_back_the_clean_latent(stage, level):
    clean, noise = stage_latents()
    start, end = stage_pair(clean, noise, stage, SCHEDULE)
    drawn = jnp.asarray([level, 0.5, 0.9])
    x = losses.interpolate(start, end, drawn)
    exact = losses.clean_prediction(x, start - end, drawn, stage, SCHEDULE)
    assert relative_error(exact, clean) < 1e-6
    paper = losses.clean_prediction(x, start - end, drawn, stage, SCHEDULE, 'paper')
    detail = clean - up(down(clean))
    assert relative_error(paper, clean + (losses.detail_gain(stage, SCHEDULE) - 1) * detail) < 1e-6


def test_detail_gain_of_the_released_schedule():
    gains = [losses.detail_gain(stage, SCHEDULE) for stage in STAGES]
    assert gains == pytest.approx([1, 1.1431, 1], abs=5e-5)


def test_clean_prediction_of_a_grid_that_cannot_be_halved():
    clean, noise = stage_latents((2, 1, 3, 5, 4))
    start, end = stage_pair(clean, noise, 0, SCHEDULE)
    got = losses.clean_prediction(start, start - end, jnp.ones(2), 0, SCHEDULE)
    assert relative_error(got, clean) < 1e-6


def test_unknown_clean_prediction_is_refused():
    with pytest.raises(InputError, match="'endpoint'; use one of exact, paper"):
        losses.clean_prediction(*stage_latents(), jnp.ones(3), 1, SCHEDULE, 'endpoint')


def matching_surrogate(z_theta, teacher_flow, fake_flow, weight):
    """Return the surrogate loss of distribution matching."""
    return losses.surrogate(z_theta, losses.matching_direction(teacher_flow, fake_flow, weight))


@pytest.mark.parametrize('kind', losses.CLEAN_PREDICTIONS)
def test_surrogate_gradient_is_the_weighted_direction(kind):
    clean, _ = stage_latents()
    teacher_flow, fake_flow = stage_latents(seed=1)
    flow, x = stage_latents(seed=2)
    level = jnp.asarray([0.2, 0.7, 1.0])

    def z_theta(flow):
        return losses.clean_prediction(x, flow, level, 1, SCHEDULE, kind)

    weight = losses.probe_weight(teacher_flow, clean)
    l1 = np.abs(np.asarray(teacher_flow) - np.asarray(clean)).reshape(3, -1).sum(axis=1)
    assert relative_error(weight, 1 / l1) < 1e-6

    got = jax.grad(lambda flow: matching_surrogate(z_theta(flow), teacher_flow, fake_flow, weight))(flow)
    # The definition: w (D - D_phi) for every sample, pulled back through z_theta, averaged over the batch.
    direction = (teacher_flow - fake_flow) / l1[:, None, None, None, None].astype(np.float32)
    _, pull_back = jax.vjp(z_theta, flow)
    assert relative_error(got, pull_back(direction / 3)[0]) < 1e-6


def test_surrogate_gives_no_gradient_to_either_model():
    z_theta, teacher_flow = stage_latents()
    fake_flow, flow = stage_latents(seed=1)

    def surrogate(teacher_flow, fake_flow):
        weight = losses.probe_weight(teacher_flow, flow)
        return matching_surrogate(z_theta, teacher_flow, fake_flow, weight)

    for gradient in jax.grad(surrogate, argnums=(0, 1))(teacher_flow, fake_flow):
        assert not np.any(gradient)


def test_descending_the_surrogate_moves_towards_the_teacher():
    # For a point mass at m the flow at z_tau implies the clean latent m, the fake model's flow the student's own.
    clean, noise = stage_latents()
    target = clean + 1
    weight = losses.probe_weight(noise - target, noise - clean)
    gradient = jax.grad(matching_surrogate)(clean, noise - target, noise - clean, weight)
    assert float(jnp.sum(gradient * (target - clean))) < 0


def test_cauchy_loss():
    clean, noise = stage_latents()
    got = losses.cauchy(clean, noise)
    assert relative_error(got, np.log(1 + np.square(np.asarray(clean - noise)).reshape(3, -1).sum(axis=1))) < 1e-6
    assert not np.any(losses.cauchy(clean, clean))


def test_a_perfect_teacher_has_a_finite_weight():
    clean, _ = stage_latents()
    assert np.all(np.isfinite(losses.probe_weight(clean, clean)))
