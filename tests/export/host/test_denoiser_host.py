"""The denoiser's stage graphs in the sampler, the host's part of a call, and the recorder."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from export.graphs.denoiser import SHIPPED, denoiser_graphs
from export.graphs.runners import OnnxSession
from export.graphs.table import FORBIDDEN
from export.graphs.to_onnx import to_onnx
from export.host.denoiser_host import DenoiserHost, GraphDenoiser
from export.host.recording import Recorder
from export.measure.snr import snr_db
from neodragon_jax.pyramid.sampler import DrawnNoise, Plan, Prompt, jax_denoiser, sample
from support.arrays import normal

UNITS, GRID, TEXT_TOKENS, STAGES = 3, (4, 8), 16, 3
LATENT_GRIDS = ((2, 4), (4, 8), (8, 16))
# Graphs that also generate frame 0.
FORM = dataclasses.replace(SHIPPED, supports_frame_zero=True)


@pytest.fixture(scope='module')
def exported(denoiser, tmp_path_factory) -> GraphDenoiser:
    """The denoiser over the three stages as ONNX graphs."""
    folder = tmp_path_factory.mktemp('float')
    graphs = denoiser_graphs(*denoiser, UNITS, GRID, TEXT_TOKENS, STAGES, FORM)
    for graph in graphs:
        to_onnx(graph, folder / f'{graph.name}.onnx')
    return GraphDenoiser(DenoiserHost(*denoiser, FORM), [OnnxSession(folder / f'{g.name}.onnx') for g in graphs])


@pytest.fixture(scope='module')
def prompt(denoiser) -> Prompt:
    """Two prompts of different lengths."""
    config = denoiser[0].config
    mask = (np.arange(TEXT_TOKENS) < np.array([[9], [16]])).astype(np.int32)
    return Prompt(*map(jnp.asarray, (normal(1, 2, TEXT_TOKENS, config.width), mask, normal(2, 2, 48))))


def call_inputs(stage: int, unit: int, seed: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Return front-padded history, noisy latent and unit of one denoiser call."""
    stages = [max(stage - distance + 1, 0) for distance in range(UNITS, 0, -1)]
    history = [normal(seed + i, 1, 1, *LATENT_GRIDS[level], 16) for i, level in enumerate(stages)]
    for padding in history[: UNITS - unit]:
        padding[:] = 0
    return history, normal(seed + 9, 1, 1, *LATENT_GRIDS[stage], 16), np.array([unit], np.int32)


def arguments(inputs: Any, prompt: Prompt, timestep: float) -> tuple[Any, ...]:
    """Return the arguments of a denoiser after the stage."""
    return (*jax.tree.map(jnp.asarray, inputs), Prompt(*(field[:1] for field in prompt)), jnp.array([timestep]))


def test_padding_garbage_does_not_reach_the_flow(exported, prompt):
    stage = 2
    inputs = call_inputs(stage, unit=1, seed=5)
    history = inputs[0]
    run = lambda: np.asarray(exported(stage, *arguments(inputs, prompt, 500.0)))
    clean = run()
    for padding in history[: UNITS - 1]:
        padding[:] = 1e3 * normal(8, *padding.shape)
    np.testing.assert_array_equal(run(), clean)
    history[-1][:] = 1e3 * normal(8, *history[-1].shape)  # not padding, so that it affects the result
    assert snr_db(clean, run()) < 60


def test_sampler_runs_on_graphs(denoiser, exported, prompt):
    """A batch of two with guidance: four examples per call run through graphs of batch one."""
    model, params = denoiser
    plan = Plan(frames=UNITS + 1, height=8, width=16, steps=(1, 2, 1), guidance=3.0, first_guidance=2.0)
    noise = DrawnNoise(jax.random.split(jax.random.key(0), 2))
    negative = jax.tree.map(lambda field: field[::-1], prompt)
    want, got = (sample(f, plan, prompt, noise, negative) for f in (jax_denoiser(model.apply, params), exported))
    assert snr_db(np.asarray(want), np.asarray(got)) > 90


def test_masks_are_finite(denoiser, prompt):
    feeds = DenoiserHost(*denoiser, FORM).stage_inputs(*arguments(call_inputs(2, 1, 0), prompt, 1.0))
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in feeds.values())
    assert min(float(array.min()) for name, array in feeds.items() if name.startswith('bias')) >= FORBIDDEN


def test_recorder_is_transparent_and_keeps_every_example(denoiser, prompt):
    model, params = denoiser
    recorder = Recorder(jax_denoiser(model.apply, params))
    plan = Plan(frames=2, height=8, width=16, steps=(1, 1, 2), first_steps=(2, 1, 1))
    noise = DrawnNoise(jax.random.split(jax.random.key(3), 2))
    got = sample(recorder, plan, prompt, noise)
    np.testing.assert_array_equal(
        np.asarray(got), np.asarray(sample(jax_denoiser(model.apply, params), plan, prompt, noise))
    )
    assert {stage: len(calls) for stage, calls in recorder.samples.items()} == {0: 6, 1: 4, 2: 6}
    assert [int(call.unit[0]) for call in recorder.samples[0]] == [0, 0, 0, 0, 1, 1]
    call = recorder.samples[2][-1]
    assert call.x.shape == call.flow.shape == (1, 1, 8, 16, 16)
    np.testing.assert_array_equal(call.prompt.text, prompt.text[1:])
