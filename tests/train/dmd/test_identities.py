"""The gradient of every objective against slow float64 NumPy, see `support.wave_world`."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support import wave_world
from support.point_world import BATCH, CHANNELS, FRAMES, GRID, make_batch, point_program
from support.wave_world import Row, Wave, cauchy, params, slopes, wave
from train.dmd.critic import FeatureCritic
from train.dmd.objectives.adversarial import AdversarialConfig
from train.dmd.objectives.weighted import ObjectivesConfig
from train.runtime.optimizer import OptimizerConfig

TEACHER, STUDENT, FAKE, START, CRITIC = (params(seed) for seed in range(5))
GUIDANCE, NEGATIVE = 3.0, np.ones(6)
STEPS = (2, 3, 2)
PAIRED = wave_world.paths(BATCH, FRAMES, GRID, CHANNELS)
ADVERSARIAL = AdversarialConfig(weight=0.3, r1=0.5, r2=0.25)


class WaveCritic(FeatureCritic):
    """A critic with the flow of the fake model as its features."""

    def init(self, key):
        del key
        return jax.tree.map(jnp.float32, CRITIC)

    def flow_and_logit(self, fake, critic, example, stage, probe):
        variables, units = {'params': fake}, example.unit[:, None] + jnp.arange(1 - FRAMES, 1)
        inputs = ([*example.history, probe.x], None, None, example.prompt.pooled, probe.timestep, units)
        flow = Wave().apply(variables, *inputs)
        seen = jnp.sin(critic['gain'] * probe.x + critic['told'] * flow)
        return flow, critic['head'] * jnp.sum(seen, axis=(1, 2, 3, 4))


def logit(critic: dict[str, float], fake: dict[str, float], row: Row, x: np.ndarray, tau: float) -> float:
    return critic['head'] * float(np.sum(np.sin(critic['gain'] * x + critic['told'] * row.flow(fake, x, tau))))


def softplus(x: float) -> float:
    return float(np.logaddexp(0.0, x))


def program_of(objective: str, **options: Any):
    """Return the program of one objective, with the wave as its denoiser."""
    given = {name: {'weight': 0.0} for name in ('matching', 'regression')}
    kinds = {field.name: field.default_factory for field in dataclasses.fields(ObjectivesConfig)}
    configs = {name: kinds[name](**values) for name, values in given.items()}
    configs[objective] = options.pop('part', None) or kinds[objective](weight=1.0)
    given = {'protocol': '21', 'student_steps': STEPS, 'student_first_steps': STEPS}
    guidance = {'guidance': GUIDANCE, 'first_guidance': GUIDANCE}
    program = point_program(objectives=ObjectivesConfig(**configs), **given | guidance | options)
    program.module = program.teacher_module = Wave()  # pyright: ignore[reportAttributeAccessIssue]
    return program


def frozen_of(program) -> dict[str, Any]:
    return program.frozen() | {'teacher': TEACHER, 'start': START}


def drawn(program, stage: int) -> dict[str, Any]:
    """Return a batch with the random numbers of one update of either model."""
    batch, key = make_batch(), jax.random.key(5)
    if program.config.pairs:
        batch |= {name: jnp.asarray(array, jnp.float32) for name, array in PAIRED.items()}
    shape = batch['latents'].shape
    draws = program.examples.draw(jax.random.split(key, 3)[0], stage, shape)
    return (
        batch | draws | program.updates.draw_fake(stage, shape, key) | program.updates.draw_student(stage, shape, key)
    )


def gradient_of(program, stage: int, batch) -> dict[str, float]:
    """Return the gradient of the student's loss; all other models get none."""
    loss = lambda student, trained, frozen: program.updates.student_loss(stage, 0, trained, frozen, student, batch)[0]
    trained, models = (FAKE, CRITIC), {name: frozen_of(program)[name] for name in ('teacher', 'start')}
    call = lambda student, trained, models: loss(student, trained, program.frozen() | models)
    of_student, *others = jax.jit(jax.grad(call, argnums=(0, 1, 2)))(
        *jax.tree.map(jnp.float32, (STUDENT, trained, models))
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(others))
    return {name: float(value) for name, value in of_student.items()}


def assert_equal(got: dict[str, float], want: dict[str, float]) -> None:
    scale = max(abs(value) for value in want.values())
    assert scale > 1e-5
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=2e-4, abs=2e-4 * scale), name


def rows_of(batch, stage: int) -> list[Row]:
    return [Row(batch, index, stage, STEPS[stage]) for index in range(BATCH)]


def teacher(row: Row, x: np.ndarray, level: float) -> np.ndarray:
    return row.guided(TEACHER, x, level, NEGATIVE, GUIDANCE)


def detached_loss(row: Row, objective: str):
    """Return one sample's loss of the student's parameters; parts without a gradient are computed outside."""
    if objective == 'matching':
        tau = float(row.draw('matching/tau'))
        x, flow = row.probe(row.z_theta(STUDENT), tau, row.draw('matching/noise'))
        weight = 1 / np.abs(teacher(row, x, tau) - flow).sum()
        pull = weight * (teacher(row, x, tau) - row.flow(FAKE, x, tau))
        return lambda p: float(np.sum(pull * row.z_theta(p)))
    if objective == 'adversarial':
        tau, noise = float(row.draw('adversarial/tau')), row.draw('adversarial/noise')
        logits = lambda p: logit(CRITIC, FAKE, row, row.probe(row.z_theta(p), tau, noise)[0], tau)
        return lambda p: softplus(-logits(p))
    if objective == 'consistency':
        velocity, step = teacher(row, row.x, row.level), 1e-5
        along = lambda shift: row.flow(STUDENT, row.x + shift * velocity, row.level + shift)
        flow = velocity - row.level * (along(step) - along(-step)) / (2 * step)
    elif objective == 'progressive':
        x, levels = row.x, [row.level - part / 2 / row.steps for part in range(3)]
        for level, after in itertools.pairwise(levels):
            x = x - (level - after) * row.flow(START, x, level)
        flow = (row.x - x) * row.steps
    else:
        return lambda p: cauchy(row.z_theta(p) - row.target)
    target = wave_world.clean_of(row.x, flow, row.level, row.stage)
    return lambda p: cauchy(row.z_theta(p) - target)


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    'matching': ('matching', {}),
    'regression': ('regression', {}),
    'pairs': ('regression', {'pairs': True}),
    'adversarial': ('adversarial', {'part': AdversarialConfig(weight=1.0)}),
    'consistency': ('consistency', {'levels': 'uniform'}),
    'progressive': ('progressive', {}),
}


def prepared(name: str):
    """Return the program of an objective, and the objective's own name."""
    objective, options = OPTIONS[name]
    program = program_of(objective, **options)
    if objective == 'progressive':
        config = dataclasses.replace(program.config.objectives.progressive, finer='start')
        objectives = dataclasses.replace(program.config.objectives, progressive=config)
        program.config = dataclasses.replace(program.config, objectives=objectives, start='stored')
    if objective == 'adversarial':
        program.critic = WaveCritic(program.config.objectives.adversarial, program.module)
    return program, objective


@pytest.mark.parametrize('stage', range(3))
@pytest.mark.parametrize('name', OPTIONS)
def test_gradient_of_the_student(name, stage):
    program, objective = prepared(name)
    batch = drawn(program, stage)
    losses = [detached_loss(row, objective) for row in rows_of(batch, stage)]
    want = slopes(lambda p: float(np.mean([loss(p) for loss in losses])), STUDENT)
    assert_equal(gradient_of(program, stage, batch), want)


@pytest.mark.parametrize('stage', range(3))
@pytest.mark.parametrize('adversarial', [False, True])
def test_gradient_of_the_fake_model_and_the_critic(adversarial, stage):
    program = program_of('adversarial', part=ADVERSARIAL) if adversarial else program_of('matching')
    program.critic = WaveCritic(ADVERSARIAL, program.module) if adversarial else None
    batch = drawn(program, stage)

    def loss_of(row: Row, fake: dict[str, float], critic: dict[str, float]) -> float:
        tau, noise = float(row.draw('fake/tau')), row.draw('fake/noise')
        x, flow = row.probe(row.z_theta(STUDENT), tau, noise)
        error = float(np.mean((row.flow(fake, x, tau) - flow) ** 2))
        if not adversarial:
            return error
        real, _ = row.probe(row.clean, tau, noise)
        logits = lambda x: logit(critic, fake, row, x, tau)
        loss = softplus(-logits(real)) + softplus(logits(x))
        for weight, name, seen in ((0.5, 'fake/r1', real), (0.25, 'fake/r2', x)):
            loss += weight * ((logits(seen + 0.1 * row.draw(name)) - logits(seen)) / 0.1) ** 2
        return error + 0.3 * loss

    rows = rows_of(batch, stage)
    total = lambda fake, critic: float(np.mean([loss_of(row, fake, critic) for row in rows]))
    updates = program.updates
    loss = lambda student, trained: updates.fake_loss(stage, 0, student, trained, batch)[0]
    value, (of_student, (of_fake, of_critic)) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
        *jax.tree.map(jnp.float32, (STUDENT, (FAKE, CRITIC)))
    )
    assert float(value) == pytest.approx(total(FAKE, CRITIC), rel=1e-4)
    assert not any(np.any(leaf) for leaf in of_student.values())
    assert_equal({name: float(slope) for name, slope in of_fake.items()}, slopes(lambda p: total(p, CRITIC), FAKE))
    if adversarial:
        used = {name: CRITIC[name] for name in ('gain', 'told', 'head')}
        want = slopes(lambda p: total(FAKE, {**CRITIC, **p}), used)
        assert_equal({name: float(of_critic[name]) for name in used}, want)


@pytest.mark.long
def test_parts_of_a_batch_make_the_step_of_the_whole_with_a_critic():
    """The noise of R1 and R2 travels with its rows, too."""
    states = []
    for parts in (1, 4):
        rate = OptimizerConfig(learning_rate=0.01, clip_norm=100.0)
        program = program_of('adversarial', part=ADVERSARIAL, accumulate=parts, student=rate, fake=rate)
        program.critic, program.teacher = WaveCritic(ADVERSARIAL, program.module), jax.tree.map(jnp.float32, TEACHER)
        state = program.init_state(jax.random.key(0), program.frozen())
        batch = {name: jnp.stack([leaf] * program.config.updates) for name, leaf in make_batch().items()}
        state, _ = program.train_step(1, state, program.frozen(), batch, jax.random.key(1))
        states.append(state)
    for name in ('student', 'fake', 'critic'):
        whole, in_parts = (getattr(state, name) for state in states)
        assert in_parts.keys() == whole.keys()
        for leaf in whole:
            assert float(in_parts[leaf]) == pytest.approx(float(whole[leaf]), abs=2e-5), (name, leaf)
    assert float(states[0].critic['gain']) != pytest.approx(CRITIC['gain'], abs=1e-3)


def test_the_two_waves_are_equal():
    batch = make_batch()
    clips = [batch['latents'][:, :1], batch['latents'][:, 1:2]]
    inputs = (clips, None, None, batch['pooled'], jnp.full(BATCH, 300.0), jnp.full((BATCH, 2), 1))
    got = Wave().apply({'params': STUDENT}, *inputs)
    for row in range(BATCH):
        frames = [np.asarray(clip[row, 0], np.float64) for clip in clips]
        want = wave(STUDENT, frames[:1], frames[1], 1, np.asarray(batch['pooled'][row], np.float64), 300.0)
        assert np.abs(got[row, 0] - want).max() < 1e-4
