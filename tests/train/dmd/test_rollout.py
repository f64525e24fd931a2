"""On-policy history: the rollout against the sampler, and the step that trains on it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.sampler import DrawnNoise, Plan, Prompt, sample
from neodragon_jax.pyramid.schedule import Schedule
from support.dmd_runs import OBJECTIVE, placed_step, settings
from support.goldens import relative_error
from support.point_world import BATCH, CHANNELS, FRAMES, GRID, make_batch, point, point_program
from support.training_runs import digests
from train.dmd import program as dmd
from train.dmd.objectives.matching import MatchingConfig
from train.dmd.objectives.regression import RegressionConfig
from train.dmd.objectives.weighted import ObjectivesConfig
from train.dmd.own_history import OwnHistoryConfig
from train.dmd.rollout import Rollout
from train.runtime.sharding import to_host

EVEN, ONE = Schedule(spacing='even'), (1, 1, 1)
KINDS = {'matching': MatchingConfig, 'regression': RegressionConfig}
ALWAYS = OwnHistoryConfig(first=1.0, last=1.0)
# Own history is enabled, but only after the steps that the tests run.
NOT_YET = OwnHistoryConfig(last=1.0, ramp_start=1000)


# --- The rollout ------------------------------------------------------------------------------------------------------


def denoise(stage, history, x, unit, prompt, timestep):
    """Return a flow that depends on every input of a denoiser."""
    past = sum((index + 1) * frame.mean(axis=(2, 3), keepdims=True) for index, frame in enumerate(history))
    told = prompt.pooled.mean(axis=1) + 0.1 * unit + timestep / 1000
    return jnp.sin(3 * x + past + told.reshape(-1, 1, 1, 1, 1) + stage)


def prompts() -> Prompt:
    batch = make_batch()
    return Prompt(batch['text'], batch['text_mask'], batch['pooled'])


def plan(steps: tuple[int, ...], first_steps: tuple[int, ...]) -> Plan:
    return Plan(FRAMES, GRID, GRID, CHANNELS, steps=steps, first_steps=first_steps, schedule=EVEN)


@functools.cache
def sampled(first_unit: int, steps: tuple[int, ...], first_steps: tuple[int, ...]):
    """Return the sampler's videos, and the states by unit and stage that its denoiser was called with."""
    noise, latents = DrawnNoise(jax.random.split(jax.random.key(0), BATCH), EVEN), make_batch()['latents']
    first, seen = latents[:, :1] if first_unit else None, {}

    def spy(at, history, x, unit, prompt, timestep):
        seen.setdefault((int(unit[0]), at), []).append(x)
        return denoise(at, history, x, unit, prompt, timestep)

    with jax.disable_jit():
        return sample(spy, plan(steps, first_steps), prompts(), noise, first_frame=first), seen


@pytest.mark.parametrize('stage', range(3))
@pytest.mark.parametrize(
    ('first_unit', 'steps', 'first_steps'),
    [(0, (1, 1, 1), (1, 1, 1)), (1, (2, 2, 1), (2, 2, 1)), (0, (1, 2, 1), (3, 1, 2))],
)
def test_videos_and_states_are_those_of_the_sampler(stage, first_unit, steps, first_steps):
    """Without compilation, which may fuse differently, they are equal bit for bit."""
    noise, latents = DrawnNoise(jax.random.split(jax.random.key(0), BATCH), EVEN), make_batch()['latents']
    want, seen = sampled(first_unit, steps, first_steps)
    rollout = Rollout(FRAMES, steps, first_steps, EVEN)
    with jax.disable_jit():
        got = rollout.generate(denoise, prompts(), latents, first_unit, FRAMES - 1, stage, noise)
    np.testing.assert_array_equal(got.videos, want)
    for unit in range(first_unit, FRAMES):
        states = got.states[: len(seen[unit, stage]), unit]
        np.testing.assert_array_equal(states[:, :, None], jnp.stack(seen[unit, stage]))
    compiled = jax.jit(lambda: rollout.generate(denoise, prompts(), latents, first_unit, FRAMES - 1, stage, noise))()
    assert relative_error(compiled.videos, want) < 1e-5


def test_a_roll_out_ends_at_the_last_unit_that_is_asked_for():
    latents = make_batch()['latents']
    noise, rollout = DrawnNoise(jax.random.split(jax.random.key(0), BATCH), EVEN), Rollout(FRAMES, ONE, ONE, EVEN)
    whole, part = (rollout.generate(denoise, prompts(), latents, 0, last, 1, noise) for last in (FRAMES - 1, 1))
    assert relative_error(part.videos[:, :2], whole.videos[:, :2]) < 1e-6
    assert not np.any(part.videos[:, 2:])
    assert np.any(whole.videos[:, 2:])


def test_share_by_step():
    ramp = OwnHistoryConfig(first=0.2, last=1.0, ramp_start=100, ramp_steps=200)
    assert [float(ramp.share(step)) for step in (0, 100, 200, 300, 999)] == pytest.approx([0.2, 0.2, 0.6, 1.0, 1.0])
    jump = OwnHistoryConfig(last=0.5, ramp_start=3)
    assert [float(jump.share(step)) for step in (0, 2, 3, 4)] == [0, 0, 0.5, 0.5]
    assert jump.enabled and not OwnHistoryConfig().enabled


@pytest.mark.parametrize(
    ('values', 'message'), [({'last': 1.5}, '^last is 1.5'), ({'ramp_steps': -1}, 'ramp_steps is -1')]
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
    with jax.disable_jit():  # compilation may fuse differently
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
    """The predictions of a student that follows its history depend on the source of that history."""
    own = OwnHistoryConfig(first=1.0, last=1.0, arrive=arrive)
    (_, without), (_, metrics) = after_a_step(Follower()), after_a_step(Follower(), own_history=own)
    assert metrics['own_history'] == 1
    # The history of unit 1 is the given first frame in any case.
    for name, changes in (('endpoint_mse/stage1/unit1', arrive), ('endpoint_mse/stage1/unit2', True)):
        # Two programs, which round differently.
        change = abs(metrics[name] / without[name] - 1)
        assert change > 1e-3 if changes else change < 1e-6, name


def attached(program, stage=1, updates=2, module=None):
    """Return the batches of an iteration with own histories, of different samples in every update."""
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]][:updates]), make_batch())
    program.module = module or program.module
    state = program.init_state(jax.random.key(0), program.frozen()).replace(student=point(1))
    keys = jax.random.split(jax.random.key(4), updates)
    return batch, program.batches(stage, state.step, state.student, batch, keys, jax.random.key(1))[0]


def test_own_histories_continue_the_first_frame():
    batch, drawn = attached(point_program(own_history=ALWAYS))
    assert np.all(drawn['own'])
    # The second update uses the roll-outs of the first update's samples as history.
    for update in range(2):
        for name in batch:
            assert np.array_equal(drawn[name][update], batch[name][0]), name
    assert np.array_equal(drawn['history'][0, :, 0], batch['latents'][0, :, 0])
    # One step of the true flow of a point leads to it.
    want = jnp.broadcast_to(point(1)['point'][0], batch['latents'][0, :, :1].shape[1:])
    want = want + batch['pooled'][0].mean(axis=1).reshape(-1, 1, 1, 1, 1)
    assert relative_error(drawn['history'][0, :, 1:2], want) < 1e-3
    batch, drawn = attached(point_program(own_history=OwnHistoryConfig(first=0.5, last=0.5)))
    assert 0 < drawn['own'].sum() < 2 * BATCH
    others = ~np.asarray(drawn['own'])
    assert np.array_equal(drawn['history'][others], batch['latents'][others])
    assert np.array_equal(drawn['pooled'][others], batch['pooled'][others])


def test_a_few_roll_outs_serve_many_positions_of_all_updates():
    batch, drawn = attached(point_program(own_history=OwnHistoryConfig(first=1.0, last=1.0, videos=2)))
    for update in range(2):
        for row in range(BATCH):
            assert np.array_equal(drawn['latents'][update, row], batch['latents'][0, row % 2])
    positions = {(row % 2, int(unit)) for update in range(2) for row, unit in enumerate(drawn['unit'][update])}
    assert len(positions) == 2 * (FRAMES - 1)


class Counting:
    """A flow that counts the predicted samples."""

    def __init__(self):
        self.samples = 0

    def apply(self, variables, clips, *rest):
        del variables, rest
        self.samples += len(clips[-1])
        return 0 * clips[-1]


def test_a_share_does_not_roll_out_the_whole_batch():
    """Two roll-outs of at most two units at three stages, instead of three batches of eight to the last unit."""
    module = Counting()
    with jax.disable_jit():
        attached(point_program(own_history=OwnHistoryConfig(first=1.0, last=1.0, videos=2)), module=module)
    shapes = 2 * 3  # a unit of both, traced for the shapes of the result
    assert 0 < module.samples <= 2 * 2 * 3 + shapes


def test_arrivals_are_the_states_of_the_roll_out():
    program = point_program(own_history=ALWAYS, student_steps=(1, 2, 1))
    _, drawn = attached(program)
    example = program.examples.build(1, *({name: array[1] for name, array in drawn.items()},) * 2)
    assert np.array_equal(example.x, drawn['arrival'][1])
    levels = {float(level) for level in example.level}
    assert levels == {1.0, 0.5}


class Proportional:
    """A flow that is a multiple of its input, so that a gradient could pass through a row of steps."""

    def apply(self, variables, clips, *rest):
        del rest
        return variables['params']['factor'] * clips[-1]


def test_no_gradient_passes_through_the_rollout():
    """The slope is that of one call at the student's own state."""
    program = point_program(own_history=ALWAYS)
    student = {'factor': jnp.float32(0.3)}

    def predicted(student):
        batch = jax.tree.map(lambda leaf: leaf[None], make_batch())
        program.module = Proportional()  # pyright: ignore[reportAttributeAccessIssue]
        keys = jax.random.split(jax.random.key(3), 1)
        batch = program.batches(2, jnp.int32(0), student, batch, keys, jax.random.key(1))[0]
        batch = {name: array[0] for name, array in batch.items()}
        example = program.examples.build(2, batch, batch)
        return jnp.sum(program.examples.predict(program.updates.denoiser(student), 2, example))

    # The last stage leads from sigma = s0 to 0, so z_theta = x - flow = (1 - factor) x.
    total, slope = jax.value_and_grad(predicted)(student)
    assert float(slope['factor']) == pytest.approx(-float(total) / 0.7, rel=1e-4)


def without(*names, **changes) -> ObjectivesConfig:
    """Return the default objectives without some of them."""
    return dataclasses.replace(ObjectivesConfig(), **{name: KINDS[name](weight=0.0) for name in names} | changes)


@pytest.mark.parametrize(('dropped', 'other'), [('matching', 'teacher'), ('regression', 'clean')])
def test_either_objective_alone(dropped, other):
    """Without one of the two terms, the result depends on the target of the other term only."""
    program, key, batch = point_program(objectives=without(dropped)), jax.random.key(5), make_batch()

    def gradient(frozen, program):
        shape = batch['latents'].shape
        rows = batch | program.examples.draw(key, 2, shape) | program.updates.draw_student(2, shape, key)
        loss = lambda student: program.updates.student_loss(2, 0, (point(2), {}), frozen, student, rows)
        return jax.grad(loss, has_aux=True)(point(1))[0]['point']

    frozen = program.frozen()
    moved = frozen | {'teacher': point(9)}
    same = np.array_equal(gradient(frozen, program), gradient(moved, program))
    assert same == (other == 'teacher')
    assert np.any(gradient(frozen, program))
    both = gradient(frozen, point_program())
    alone = [gradient(frozen, point_program(objectives=without(name))) for name in KINDS]
    assert relative_error(alone[0] + alone[1], both) < 1e-5


def test_regression_leaves_own_history_alone():
    """With its own history the student is not regressed to the data's frame, unless configured."""
    moved = []
    for factor in (0.0, 1.0):
        objectives = without('matching', regression=RegressionConfig(own_history=factor))
        (state, _) = after_a_step(own_history=ALWAYS, objectives=objectives)
        moved.append(not np.array_equal(state.student['point'], point(1)['point']))
    assert moved == [False, True]


def test_something_must_be_learned():
    with pytest.raises(InputError, match='all 0'):
        without('matching', 'regression')


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
def test_meshes_agree_and_runs_resume_behind_own_history(samples, tmp_path, monkeypatch):
    monkeypatch.setitem(OBJECTIVE, 'own_history', {'last': 1.0, 'ramp_steps': 4})
    for name, parts in (('unbroken', (4,)), ('broken', (2, 4))):
        for steps in parts:
            dmd.RECIPE.run(settings(samples, tmp_path / name, steps=steps))
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
