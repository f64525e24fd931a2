"""The objective of the teacher: its loss on a denoiser in closed form, dropped captions, and steps on meshes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.pyramid import stages as pyramid
from support.goldens import relative_error
from support.teacher_runs import (
    BATCH,
    CHANNELS,
    FRAMES,
    GRID,
    SCHEDULE,
    example_batch,
    placed_step,
    program_for,
)
from train.flow import losses
from train.runtime.sharding import to_host


class PointMass:
    """The exact flow where all data are `params['point']`: [1, T, H, W, C], a frame for each unit."""

    def __call__(self, variables, clips, text, mask, pooled, timestep, frame_ids):
        del text, mask, pooled
        x, unit = clips[-1], frame_ids[:, -1]
        stage = {GRID >> (2 - stage): stage for stage in range(3)}[x.shape[2]]
        first, last = SCHEDULE.timestep_limits[stage]
        level = (timestep - last) / (first - last)
        clean = pyramid.down(variables['params']['point'][0], 2 - stage)[unit][:, None]
        start, end = pyramid.stage_pair(clean, jnp.zeros_like(x), stage, SCHEDULE)
        sigma = losses.per_sample(SCHEDULE.sigma(stage, level), x)
        length = float(SCHEDULE.start_sigmas[stage] - SCHEDULE.end_sigmas[stage])
        return length * (x - losses.interpolate(start, end, level)) / sigma + start - end


def test_the_true_flow_has_no_loss(data, monkeypatch):
    """If the data are one point the flow is known: it equals the teacher's target at every unit and stage."""
    program = program_for(data)
    monkeypatch.setattr(program, 'apply', PointMass())
    point = jax.random.normal(jax.random.key(0), (1, FRAMES, GRID, GRID, CHANNELS))
    batch = {**example_batch(data), 'latents': jnp.broadcast_to(point, (BATCH, *point.shape[1:]))}
    loss_of = jax.jit(functools.partial(program.loss, (0, 1, 2)))
    loss, sums = loss_of({'point': point}, batch, jax.random.key(1))
    wrong, _ = loss_of({'point': point + 1}, batch, jax.random.key(1))
    assert float(loss) < 1e-4 < 0.1 < float(wrong)
    # Images have no second frame.
    images = int(np.sum(batch['units'] == 1))
    assert images and all(0 < sums[stage][1, 1] <= BATCH - images for stage in range(3))


def test_a_dropped_caption_is_the_null_prompt_whole(data, monkeypatch):
    program, batch, seen = program_for(data, caption_dropout=0.5), example_batch(data), []

    def spy(variables, clips, *prompt_and_rest):
        del variables
        seen.append([np.asarray(part) for part in prompt_and_rest[:3]])
        return clips[-1]

    monkeypatch.setattr(program, 'apply', spy)
    with jax.disable_jit():
        for seed in range(8):
            program.loss((0,), {}, batch, jax.random.key(seed))
    names, dropped = ('text', 'text_mask', 'pooled'), []
    for prompt in seen:
        for row in range(BATCH):
            own, null = (
                all(np.array_equal(part[row], want) for part, want in zip(prompt, wanted, strict=True))
                for wanted in ([batch[name][row] for name in names], [program.null[name] for name in names])
            )
            assert own != null
            dropped.append(null)
    assert len(dropped) == 64 and 0.3 < np.mean(dropped) < 0.7


@pytest.mark.long
def test_meshes_agree(data):
    results = []
    for mesh_sizes in ((1, 1, 1), (2, 2, 2)):
        step, begin, batch, key = placed_step(data, mesh_sizes, (0,))
        carry, first = step(begin(), {}, batch, key)
        # Fresh gates are zero: only the second step's gradient passes through the blocks.
        carry, second = step(carry, {}, batch, key)
        results.append(to_host((first, second, carry.state.params)))
    *want_metrics, want = results[0]
    for *metrics, params in results[1:]:
        for got_step, want_step in zip(metrics, want_metrics, strict=True):
            for name, value in want_step.items():
                assert got_step[name] == pytest.approx(value, rel=1e-4, nan_ok=True), name
        errors = jax.tree.map(relative_error, params, want)
        assert max(jax.tree.leaves(errors)) < 2e-3


def test_it_learns_and_leaves_the_positions(data):
    """On samples of four kinds, identified by their captions, at the stage where both units are one token."""
    step, begin, batch, key = placed_step(data, (1, 1, 1), (0,))
    carry, history = begin(), []
    positions = np.asarray(carry.state.params['positions'])
    for _ in range(200):
        carry, metrics = step(carry, {}, batch, key)
        history.append(to_host(metrics))
    mean = lambda name, rows: np.nanmean([row[name] for row in rows])
    for name in ('loss', 'stage0/unit0', 'stage0/unit1'):
        assert mean(name, history[-40:]) < 0.5 * mean(name, history[:10]), name
    assert np.array_equal(carry.state.params['positions'], positions)
    # The average lags behind the parameters.
    average = carry.state.ema.params['head']['kernel']
    assert 0.001 < relative_error(average, carry.state.params['head']['kernel']) < 0.5
