"""On-policy history: the rollout against the sampler, and the step that trains behind it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.sampler import DrawnNoise, Plan, Prompt, sample
from neodragon_jax.pyramid.stages import block_noise, down
from support.dmd_runs import OBJECTIVE, digests, placed_step, samples, settings  # noqa: F401
from support.goldens import relative_error
from support.point_world import BATCH, CHANNELS, FRAMES, GRID, SCHEDULE, make_batch, point, point_program
from train.dmd import program as dmd
from train.dmd.rollout import OwnHistoryConfig, Rollout
from train.runtime.sharding import to_host

ALWAYS = OwnHistoryConfig(first=1.0, last=1.0)
# It may happen, but not in any step that a test runs.
NOT_YET = OwnHistoryConfig(last=1.0, ramp_start=1000)


# --- The rollout ------------------------------------------------------------------------------------------------------


def denoise(stage, history, x, unit, prompt, timestep):
    """Return a flow that depends on everything that a denoiser is told."""
    past = sum((index + 1) * frame.mean(axis=(2, 3), keepdims=True) for index, frame in enumerate(history))
    told = prompt.pooled.mean(axis=1) + 0.1 * unit + timestep / 1000
    return jnp.sin(3 * x + past + told.reshape(-1, 1, 1, 1, 1) + stage)


def prompts() -> Prompt:
    batch = make_batch()
    return Prompt(batch['text'], batch['text_mask'], batch['pooled'])


class SameNoise:
    """The same noise for every unit, so that a unit does not depend on its number but through the denoiser."""

    def initial(self, shape):
        return jnp.broadcast_to(jax.random.normal(jax.random.key(0), (shape[0], 1, *shape[2:])), shape)

    def block(self, unit, stage, shape):
        return block_noise(jax.random.key(stage), shape)

    def posterior(self, shape):
        raise AssertionError('nothing is encoded here')


def plan(steps: int) -> Plan:
    return Plan(FRAMES, GRID, GRID, CHANNELS, steps=(steps,) * 3, first_steps=(steps,) * 3)


@pytest.mark.parametrize(('first_unit', 'steps'), [(0, 1), (1, 2)])
def test_videos_are_those_of_the_sampler(first_unit, steps):
    noise, latents = DrawnNoise(jax.random.split(jax.random.key(0), BATCH)), make_batch()['latents']
    first = latents[:, :1] if first_unit else None
    want = sample(denoise, plan(steps), prompts(), noise, first_frame=first)
    rollout = Rollout(FRAMES, steps, SCHEDULE)
    got = jax.jit(lambda latents: rollout.videos(denoise, prompts(), latents, first_unit, noise))(latents)
    assert relative_error(got[:, :-1], want[:, :-1]) < 1e-5
    assert not np.any(got[:, -1])


@pytest.mark.parametrize('stage', range(3))
def test_inputs_are_where_the_sampler_arrives(stage):
    seen = {}
    keep = lambda unit, stage, step, x: seen.update({(unit, stage, step): x})
    video = sample(denoise, plan(2), prompts(), SameNoise(), on_step=keep)
    unit = jnp.arange(BATCH) % FRAMES
    inputs = Rollout(FRAMES, 2, SCHEDULE).inputs(denoise, prompts(), video, unit, stage, SameNoise())
    assert len(inputs) == 2
    want = jnp.stack([seen[int(number), stage, 0][row] for row, number in enumerate(unit)])
    assert relative_error(inputs[1], want) < 1e-5
    if stage == 0:
        assert relative_error(inputs[0], 4 * down(SameNoise().initial((BATCH, 1, GRID, GRID, CHANNELS)), 2)) < 1e-6


def test_share_by_step():
    ramp = OwnHistoryConfig(first=0.2, last=1.0, ramp_start=100, ramp_steps=200)
    assert [float(ramp.share(step)) for step in (0, 100, 200, 300, 999)] == pytest.approx([0.2, 0.2, 0.6, 1.0, 1.0])
    jump = OwnHistoryConfig(last=0.5, ramp_start=3)
    assert [float(jump.share(step)) for step in (0, 2, 3, 4)] == [0, 0, 0.5, 0.5]
    assert jump.ever and not OwnHistoryConfig().ever


@pytest.mark.parametrize(
    ('values', 'message'), [({'last': 1.5}, 'own_history.last is 1.5'), ({'ramp_steps': -1}, 'ramp_steps is -1')]
)
def test_impossible_ramps_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        OwnHistoryConfig(**values)


# --- The step, on a denoiser in closed form ---------------------------------------------------------------------------


def after_a_step(module=None, **options):
    """Return the state and the metrics after one step at stage 1."""
    program = point_program(**options)
    program.module = module or program.module
    state = program.init_state(jax.random.key(0), program.frozen()).replace(student=point(1), fake=point(2))
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * program.config.updates), make_batch())
    step = jax.jit(functools.partial(program.train_step, 1))
    return to_host(step(state, program.frozen(), batch, jax.random.key(7)))


def test_a_share_of_nothing_is_the_data_s_history_bit_for_bit():
    (want, want_metrics), (got, metrics) = after_a_step(), after_a_step(own_history=NOT_YET)
    assert metrics.pop('own_history') == 0
    assert metrics.keys() == want_metrics.keys()
    assert all(np.array_equal(metrics[name], value, equal_nan=True) for name, value in want_metrics.items())
    assert all(np.array_equal(*pair) for pair in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


class Follower:
    """A flow toward the mean of the frame before."""

    def apply(self, variables, clips, *rest):
        del rest
        return clips[-1] - clips[-2].mean(axis=(2, 3), keepdims=True) + 0 * variables['params']['point'].mean()


@pytest.mark.parametrize('arrive', [False, True])
def test_own_history_changes_the_step(arrive):
    """Where the student follows its history, its predictions depend on whose history that is."""
    own = OwnHistoryConfig(first=1.0, last=1.0, arrive=arrive)
    (_, without), (_, metrics) = after_a_step(Follower()), after_a_step(Follower(), own_history=own)
    assert metrics['own_history'] == 1
    # Unit 1 has the given first frame behind it in any case.
    for name, changes in (('endpoint_mse/stage1/unit1', arrive), ('endpoint_mse/stage1/unit2', True)):
        assert np.isfinite(metrics[name]) and (metrics[name] != without[name]) == changes, name


def test_own_histories_continue_the_first_frame():
    program, batch = point_program(own_history=ALWAYS), make_batch()
    drawn = program.own_histories(point(1), jnp.int32(0), batch, jax.random.key(0))
    assert np.all(drawn['own'])
    assert np.array_equal(drawn['history'][:, 0], batch['latents'][:, 0])
    # One step of the true flow of a point leads to it.
    want = jnp.broadcast_to(point(1)['point'][0], batch['latents'][:, :1].shape[1:])
    want = want + batch['pooled'].mean(axis=1).reshape(-1, 1, 1, 1, 1)
    assert relative_error(drawn['history'][:, 1:2], want) < 1e-3
    half = point_program(own_history=OwnHistoryConfig(first=0.5, last=0.5))
    drawn = half.own_histories(point(1), jnp.int32(0), batch, jax.random.key(1))
    assert 0 < drawn['own'].sum() < BATCH
    kept = ~np.asarray(drawn['own'])
    assert np.array_equal(drawn['history'][kept], batch['latents'][kept])


class Proportional:
    """A flow that is a multiple of its input, so that a gradient could pass through a row of steps."""

    def apply(self, variables, clips, *rest):
        del rest
        return variables['params']['factor'] * clips[-1]


def test_no_gradient_passes_through_the_rollout():
    """The slope is that of one call at the input where the student arrived."""
    program, key = point_program(own_history=ALWAYS), jax.random.key(3)
    program.module = Proportional()  # pyright: ignore[reportAttributeAccessIssue]
    student = {'factor': jnp.float32(0.3)}
    batch = make_batch()
    batch |= program.own_histories(student, jnp.int32(0), batch, key)
    predicted = lambda student: jnp.sum(program.predict(student, 2, batch, key)[1])
    # The last stage leads from sigma = s0 to 0, so z_theta = x - flow = (1 - factor) x.
    total, slope = jax.value_and_grad(predicted)(student)
    assert float(slope['factor']) == pytest.approx(-float(total) / 0.7, rel=1e-4)


@pytest.mark.parametrize(('dropped', 'other'), [('distribution_weight', 'teacher'), ('cauchy_weight', 'clean')])
def test_either_objective_alone(dropped, other):
    """Without one of the two terms its target does not matter, and the other one's does."""
    program, key, batch = point_program(**{dropped: 0.0}), jax.random.key(5), make_batch()
    gradient = lambda frozen, weights: jax.grad(weights.student_loss, has_aux=True)(
        point(1), point(2), frozen, 2, batch, key
    )[0]['point']
    frozen = program.frozen()
    moved = frozen | {'teacher': point(9)}
    same = np.array_equal(gradient(frozen, program), gradient(moved, program))
    assert same == (other == 'teacher')
    assert np.any(gradient(frozen, program))
    both = gradient(frozen, point_program())
    alone = [gradient(frozen, point_program(**{name: 0.0})) for name in ('distribution_weight', 'cauchy_weight')]
    assert relative_error(alone[0] + alone[1], both) < 1e-5


def test_something_must_be_learned():
    with pytest.raises(InputError, match='both 0'):
        point_program(distribution_weight=0.0, cauchy_weight=0.0)


def test_metrics_by_unit_and_stage():
    _, metrics = after_a_step(protocol='21')
    names = ('endpoint_mse', 'cauchy', 'fake_mse', 'teacher_error', 'direction_rms', 'weight')
    for name in names:
        parts = [metrics[f'{name}/stage1/unit{unit}'] for unit in range(FRAMES)]
        assert np.nanmin(parts) <= metrics[name] * (1 + 1e-6) and metrics[name] <= np.nanmax(parts) * (1 + 1e-6), name
    _, metrics = after_a_step()
    assert not any(name.endswith('unit0') for name in metrics)


# --- The program, on the miniature checkpoint -------------------------------------------------------------------------


@pytest.mark.slow
def test_meshes_agree_and_runs_resume_behind_own_history(samples, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(OBJECTIVE, 'own_history', {'last': 1.0, 'ramp_steps': 4})
    for name, parts in (('unbroken', (4,)), ('broken', (2, 4))):
        for steps in parts:
            dmd.main(settings(samples, tmp_path / name, steps=steps))
    assert digests(tmp_path / 'unbroken' / 'result') == digests(tmp_path / 'broken' / 'result')
    monkeypatch.setitem(OBJECTIVE, 'own_history', {'first': 1.0, 'last': 1.0})
    placed_step.cache_clear()
    results = []
    for mesh in ((1, 1, 1), (2, 2, 2)):
        step, begin, frozen, batch, key = placed_step(samples, mesh)
        results.append(to_host(step(begin(), frozen, batch, key)[1]))
    placed_step.cache_clear()
    assert results[0]['own_history'] == 1
    for name, value in results[0].items():
        assert results[1][name] == pytest.approx(value, rel=1e-3, nan_ok=True), name
