"""The guided teacher of many videos against the plain sampler, and the stored starts of its stages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.models.mmdit import stack_blocks
from neodragon_jax.pyramid.sampler import DrawnNoise, Plan, Prompt, guided, jax_denoiser, sample
from neodragon_jax.pyramid.schedule import Schedule
from neodragon_jax.pyramid.stages import down_noise
from support.goldens import relative_error
from support.mmdit import model_and_params
from train.flow.guidance import scale_by_unit
from train.flow.guided_teacher import GuidedTeacher, calls_of
from train.flow.stage_starts import StartRecorder, start_name, start_shapes, teacher_path
from train.runtime.sharding import MeshConfig, batch_sharding, make_mesh, param_shardings, put

BATCH, FRAMES, GRID = 2, 3, 8
SCALE = scale_by_unit(3.0, 5.0)


def parts():
    """Return a denoiser with scanned blocks, its parameters, a plan, prompts and the negative prompt."""
    model, params = model_and_params('dit_a')
    sizes, rng = model.config, np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    prompt = Prompt(
        draw(BATCH, 4, sizes.width), jnp.ones((BATCH, 4), jnp.int32), draw(BATCH, sizes.pooled_projection_dim)
    )
    negative = Prompt(draw(4, sizes.width), jnp.ones(4, jnp.int32), draw(sizes.pooled_projection_dim))
    plan = Plan(FRAMES, GRID, GRID, sizes.in_channels, (1, 2, 1), (2, 1, 1))
    params = jax.tree.map(np.asarray, stack_blocks(params, sizes.num_layers))
    return model.clone(scan=True), params, plan, prompt, negative


@pytest.mark.parametrize('given', [pytest.param(False, marks=pytest.mark.long), True])
def test_samples_are_those_of_the_plain_sampler(given):
    module, params, plan, prompt, negative = parts()
    noise = DrawnNoise(jax.random.split(jax.random.key(0), BATCH))
    first = jax.random.normal(jax.random.key(1), (BATCH, 1, GRID, GRID, plan.channels)) if given else None
    want = sample(guided(jax_denoiser(module.apply, params), negative, SCALE), plan, prompt, noise, first_frame=first)
    mesh = make_mesh(MeshConfig(1, 1, 1))
    recorder = StartRecorder(GuidedTeacher(module, lambda: params, negative, SCALE, plan, mesh).denoiser(int(given)))
    got = sample(recorder, plan, prompt, noise, first_frame=first)
    assert relative_error(got, want) < 2e-5
    starts = recorder.starts(FRAMES)
    assert {name: array.shape[1:] for name, array in starts.items()} == start_shapes(got.shape[1:], 3)
    # The coarsest stage starts at the noise, which the seed, the prompt and the number of a sample determine.
    coarse = down_noise(noise.initial(got.shape), 2)
    np.testing.assert_array_equal(starts[start_name(0)][:, int(given) :], coarse[:, int(given) :])
    assert not given or not np.any(starts[start_name(2)][:, 0])


def test_a_path_joins_the_steps_of_the_sampler():
    """With one step per stage, the end of a stage is start - flow, and the start of the next stage determines it."""
    schedule, unit = Schedule(), jnp.full(BATCH, 1)
    rng, flows = np.random.default_rng(1), {}

    def denoise(stage, history, x, unit, prompt, timestep):
        del history, prompt, timestep
        return flows.setdefault((int(unit[0]), stage), jnp.asarray(rng.standard_normal(x.shape), jnp.float32))

    recorder, plan = StartRecorder(denoise), Plan(FRAMES, GRID, GRID, 4)
    prompt = Prompt(jnp.zeros((BATCH, 1, 1)), jnp.ones((BATCH, 1), jnp.int32), jnp.zeros((BATCH, 1)))
    latents = sample(recorder, plan, prompt, DrawnNoise(jax.random.split(jax.random.key(2), BATCH)))
    batch = recorder.starts(FRAMES) | {'latents': latents}
    for stage in range(3):
        start, end = teacher_path(batch, stage, unit, schedule)
        assert relative_error(start - end, flows[1, stage]) < 1e-5, stage


def test_calls_are_those_of_the_sampler():
    plan, seen = parts()[2], []

    def denoise(stage, history, x, unit, prompt, timestep):
        seen.append((int(unit[0]), stage, float(timestep[0])))
        return 0 * x

    sample(denoise, plan, parts()[3], DrawnNoise(jax.random.split(jax.random.key(0), BATCH)))
    want = [(call.unit, call.stage, call.timestep) for call in calls_of(plan, 0)]
    assert [one[:2] for one in seen] == [one[:2] for one in want]
    assert np.allclose([one[2] for one in seen], [one[2] for one in want])


def test_a_split_denoiser_gives_the_same_flow():
    module, params, plan, prompt, negative = parts()
    history = [jnp.zeros((BATCH, 1, 2, 2, plan.channels))] * (FRAMES - 1)
    x, unit = jnp.ones((BATCH, 1, 2, 2, plan.channels)), jnp.ones(BATCH, jnp.int32)
    flows = []
    for sizes in ((1, 1, 1), (1, 2, 2)):
        mesh = make_mesh(MeshConfig(*sizes))
        placed = put(params, param_shardings(mesh, params))
        split = lambda tree, mesh=mesh: jax.device_put(tree, batch_sharding(mesh))
        teacher = GuidedTeacher(module, lambda placed=placed: placed, negative, SCALE, plan, mesh)
        flows.append(teacher.denoiser(1)(0, split(history), split(x), split(unit), split(prompt), jnp.zeros(BATCH)))
    assert relative_error(flows[1], flows[0]) < 1e-5
