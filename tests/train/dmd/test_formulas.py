"""The formulas of step distillation, on a denoiser whose distribution is one point, in closed form."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from neodragon_jax.checkpoint.names.mmdit import mmdit_names
from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.models.mmdit import PyramidMMDiT, stack_blocks
from neodragon_jax.pyramid import stages as pyramid
from neodragon_jax.pyramid.history import history
from neodragon_jax.pyramid.schedule import Schedule
from support.goldens import GOLDENS, channels_last, load_golden, relative_error
from support.point_world import BATCH, PointMass, make_batch, point, point_program
from train.dmd.objectives.regression import RegressionConfig
from train.dmd.objectives.weighted import ObjectivesConfig
from train.measure import packing
from train.runtime.optimizer import OptimizerConfig

PROMPTS = ('a red ball', 'a blue cube', 'a cat')


# --- A denoiser whose distribution is one point -----------------------------------------------------------------------


def drawn(program, stage, batch, key):
    """Return a batch with the random numbers of one update of either model."""
    draw = program.examples.draw(jax.random.split(key, 3)[0], stage, batch['latents'].shape)
    shape = batch['latents'].shape
    return batch | draw | program.updates.draw_fake(stage, shape, key) | program.updates.draw_student(stage, shape, key)


@pytest.mark.parametrize('stage', range(3))
def test_student_gradient_is_the_definition(stage):
    options = {'protocol': '21', 'student_steps': (4, 4, 4), 'guidance': 3.0, 'first_guidance': 7.0}
    program, key = point_program(**options), jax.random.key(5)
    batch = drawn(program, stage, make_batch(), key)
    student, fake, frozen, updates = point(1), point(2), program.frozen(), program.updates
    loss = lambda student: updates.student_loss(stage, 0, (fake, {}), frozen, student, batch)
    gradient = jax.grad(loss, has_aux=True)(student)[0]

    example = program.examples.build(stage, batch, batch)
    predict = lambda params: program.examples.predict(updates.denoiser(params), stage, example)
    z_theta = predict(student)
    assert set(np.asarray(batch['matching/tau']).tolist()) <= {0.125, 0.375, 0.625, 0.875}
    probe = program.examples.probe(z_theta, stage, batch['matching/tau'], batch['matching/noise'])
    flow = lambda params, pooled: PointMass().apply({'params': params}, [probe.x], 0, 0, pooled, probe.timestep, 0)
    negative, positive = flow(program.teacher, jnp.ones((BATCH, 6))), flow(program.teacher, batch['pooled'])
    scale = np.where(np.asarray(example.unit) == 0, 7.0, 3.0).reshape(-1, 1, 1, 1, 1)
    assert set(np.asarray(example.unit)) >= {0, 1}
    teacher_flow = negative + scale * (positive - negative)
    weight = 1 / np.abs(teacher_flow - probe.flow).sum(axis=(1, 2, 3, 4), keepdims=True)
    error = z_theta - example.clean
    cauchy_slope = 2 * error / (1 + jnp.sum(error**2, axis=(1, 2, 3, 4), keepdims=True))
    slope = weight * (teacher_flow - flow(fake, batch['pooled'])) + 0.5 * cauchy_slope
    _, pull_back = jax.vjp(predict, student)
    assert relative_error(gradient['point'], pull_back(slope / BATCH)[0]['point']) < 1e-5


def test_only_the_student_gets_a_gradient():
    program, key = point_program(), jax.random.key(5)
    batch, updates = drawn(program, 1, make_batch(), key), program.updates
    surrogate = lambda student, fake, frozen: updates.student_loss(1, 0, (fake, {}), frozen, student, batch)[0]
    frozen = {'teacher': program.teacher, 'negative': program.negative}
    gradients = jax.grad(surrogate, argnums=(0, 1, 2), allow_int=True)(point(1), point(2), frozen)
    assert np.any(gradients[0]['point'])
    assert not np.any(gradients[1]['point'])
    assert not np.any(gradients[2]['teacher']['point'])
    fake_loss = lambda fake, student: updates.fake_loss(1, 0, student, (fake, {}), batch)[0]
    gradients = jax.grad(fake_loss, argnums=(0, 1))(point(2), point(1))
    assert np.any(gradients[0]['point'])
    assert not np.any(gradients[1]['point'])


@pytest.mark.parametrize('stage', range(3))
def test_distribution_matching_alone_finds_the_teacher(stage):
    """Student and fake model start at another point than the teacher's, and only the DMD term moves them."""
    rate = OptimizerConfig(learning_rate=0.03, betas=(0.0, 0.95), weight_decay=0.0)
    objectives = ObjectivesConfig(regression=RegressionConfig(weight=0.0))
    program = point_program(student=rate, fake=rate, objectives=objectives)
    state = program.init_state(jax.random.key(0), program.frozen()).replace(student=point(1), fake=point(1))
    at_stage = lambda params: pyramid.down(params['point'], 2 - stage)
    distance = lambda a, b: float(jnp.linalg.norm(at_stage(a) - at_stage(b)))
    before = distance(state.student, program.teacher)
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), make_batch(pooled_scale=0.0))
    frozen = program.frozen() | {'negative': jax.tree.map(jnp.zeros_like, program.negative)}
    step = jax.jit(functools.partial(program.train_step, stage))
    for key in jax.random.split(jax.random.key(1), 100):
        state, _ = step(state, frozen, batch, key)
    assert distance(state.student, program.teacher) < 0.1 * before
    assert distance(state.student, state.fake) < 0.1 * before


@pytest.mark.parametrize(('protocol', 'units'), [('18', {1, 2}), ('21', {0, 1, 2})])
def test_draws_cover_every_unit(protocol, units):
    program, batch = point_program(protocol=protocol), make_batch()
    seen = set()
    for seed in range(5):
        draws = program.examples.draw(jax.random.key(seed), 1, batch['latents'].shape)
        example = program.examples.build(1, batch, draws)
        seen |= set(np.asarray(example.unit).tolist())
        for row, unit in enumerate(np.asarray(example.unit)):
            latents = batch['latents'][row : row + 1]
            assert relative_error(example.clean[row], pyramid.down(latents, 1)[0, unit : unit + 1]) < 1e-6
            want = history(latents[:, :unit], 1, 3)
            for clip, frame in zip(reversed(want), reversed(example.history), strict=False):
                assert relative_error(frame[row, -1:], clip[0, -1:]) < 1e-6
    assert seen == units


def test_draws_cover_every_stage_evenly():
    program = point_program(seed=3)
    counts = np.bincount([program.variant(step) for step in range(3000)], minlength=3)
    assert counts.min() > 900
    assert [program.variant(step) for step in range(20)] != [point_program(seed=4).variant(step) for step in range(20)]


def test_levels_of_a_student_with_several_steps():
    """The student is evaluated only at the levels of its own schedule, which depend on the unit."""
    program, seen = point_program(protocol='21', student_steps=(1, 4, 1), student_first_steps=(1, 2, 1)), set()
    for seed in range(8):
        draws = program.examples.draw(jax.random.key(seed), 1, make_batch()['latents'].shape)
        example = program.examples.build(1, make_batch(), draws)
        seen |= {
            (int(unit) > 0, round(float(level), 6)) for unit, level in zip(example.unit, example.level, strict=True)
        }
    even = Schedule(spacing='even')
    for later, count in ((False, 2), (True, 4)):
        levels = even.steps(1, count).levels
        assert {level for kind, level in seen if kind == later} == set(levels[:-1].tolist())
        assert np.ptp(np.diff(levels)) < 1e-12  # no step is shorter than another


@pytest.mark.parametrize('scan', [False, True])
def test_packed_sequence_equals_a_call_per_stage(scan):
    golden = load_golden('dit_a')
    config = MMDiTConfig.from_json(json.loads((GOLDENS / 'dit_a' / 'config.json').read_text()), 'dit_a')
    tensors = safetensors.numpy.load_file(GOLDENS / 'dit_a' / 'model.safetensors')
    flat = {entry.path: jnp.asarray(entry.convert.to_flax(tensors[entry.torch_name])) for entry in mmdit_names(config)}
    params = traverse_util.unflatten_dict(flat)
    params = stack_blocks(params, config.num_layers) if scan else params
    calls = []
    for stage in range(3):
        names = [name for name in golden if name.startswith(f'packed3/in/stage{stage}_clip')]
        clips = [jnp.asarray(channels_last(golden[name])) for name in names]
        inputs = (golden[f'packed3/in/{name}'][stage::3] for name in ('text', 'text_mask', 'pooled', 'timestep'))
        frames = sum(clip.shape[1] for clip in clips)
        calls.append(packing.Call(clips, *map(jnp.asarray, inputs), jnp.broadcast_to(jnp.arange(frames), (2, frames))))
    run = jax.jit(lambda params, calls: packing.packed_flows(PyramidMMDiT(config, scan=scan), params, calls))
    for stage, flow in enumerate(run(params, calls)):
        assert relative_error(flow, channels_last(golden[f'packed3/out_stage{stage}'])) < 2e-5
