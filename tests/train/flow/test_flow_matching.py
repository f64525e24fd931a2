"""Examples of pyramidal flow matching: given the reference's draws, its golden arrays; and how they are drawn."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid import stages as pyramid
from neodragon_jax.pyramid.history import envelope
from neodragon_jax.pyramid.schedule import Schedule
from support.goldens import GOLDENS, channels_last, load_golden, relative_error
from train.flow import flow_matching

SCHEDULE = Schedule()
CASES = json.loads((GOLDENS / 'pf_training' / 'config.json').read_text())
ONE_FRAME_UNITS = [name for name, case in CASES.items() if case['frames_per_unit'] == 1]


@pytest.fixture(scope='module')
def golden() -> dict[str, np.ndarray]:
    return load_golden('pf_training')


def golden_draws(golden, name: str, column: int, columns: int, unit: int, frames: int) -> flow_matching.Draws:
    """Return the reference's random draws for a column, in the project's form."""
    drawn = lambda what: golden[f'{name}/draw/col{column}_{what}']
    level = SCHEDULE.train_levels[np.floor(1000 * drawn('u')).astype(int)]
    clips = len([key for key in golden if key.startswith(f'{name}/draw/col{column}_cond_noise')])
    newest_first = [channels_last(drawn(f'cond_noise{i}_from_most_recent')) for i in range(clips)]
    by_frame = [clip[:, i : i + 1] for clip in reversed(newest_first) for i in range(clip.shape[1])]
    assert len(by_frame) == unit
    # The noise of padded frames is arbitrary: attention masks them.
    coarsest = channels_last(golden[f'{name}/pyramid_level0'])[column::columns, :1]
    padding = [np.ones_like(coarsest)] * (frames - 1 - unit)
    return flow_matching.Draws(
        unit=jnp.full(len(level), unit),
        level=jnp.asarray(level, jnp.float32),
        amount=jnp.asarray(drawn('cond_sigma_raw') * CASES[name]['corrupt_ratio'], jnp.float32),
        noise=jnp.asarray(channels_last(golden[f'{name}/draw/noise_fullres'])[column::columns, unit : unit + 1]),
        history_noise=[jnp.asarray(noise) for noise in [*padding, *by_frame]],
    )


@pytest.mark.parametrize('name', ONE_FRAME_UNITS)
def test_examples_match_the_reference(golden, name):
    case = CASES[name]
    columns = len(case['column_to_stage'])
    for column, stage in enumerate(case['column_to_stage']):
        unit = case['units_low_mid_high'][stage] - 1
        latents = jnp.asarray(channels_last(golden[f'{name}/pyramid_level2'])[column::columns])
        # The envelope may be larger than the history, and then begins with padding of the shape that it has there.
        frames = unit + 1 if stage else latents.shape[1]
        draws = golden_draws(golden, name, column, columns, unit, frames)
        example = flow_matching.build(stage, latents[:, :frames], draws, SCHEDULE)
        out = lambda what, column=column: golden[f'{name}/out/col{column}_{what}']
        clips = [
            channels_last(out(f'clip{i}'))
            for i in range(len([k for k in golden if k.startswith(f'{name}/out/col{column}_clip')]))
        ]
        *want, want_x = clips
        assert len(example.history) == frames - 1
        history = example.history[frames - 1 - unit :]
        for clip in want:
            got, history = history[: clip.shape[1]], history[clip.shape[1] :]
            assert relative_error(jnp.concatenate(got, axis=1), clip) < 2e-5
        assert not history
        assert relative_error(example.x, want_x) < 2e-5
        assert relative_error(example.flow, channels_last(out('target'))) < 2e-5
        assert relative_error(example.timestep, out('timestep')) < 1e-6


@pytest.mark.parametrize('stage', range(3))
def test_draws(stage):
    units = jnp.asarray([1, 3] * 500)
    draws = flow_matching.draw(jax.random.key(stage), stage, (1000, 3, 8, 8, 2), units, SCHEDULE)
    assert set(np.asarray(draws.unit[::2])) == {0}
    counts = np.bincount(np.asarray(draws.unit[1::2]), minlength=3)
    assert counts.min() > 120 and len(counts) == 3
    grid = np.asarray(1000 * draws.level)
    assert np.abs(grid - grid.round()).max() < 1e-3 and grid.min() >= 0.5 and grid.max() <= 1000
    assert len(set(grid.round())) > 500 and abs(grid.mean() - 500) < 40
    amount = np.asarray(draws.amount)
    assert 0 <= amount.min() < 0.02 and 0.31 < amount.max() < 1 / 3 and abs(amount.mean() - 1 / 6) < 0.01
    want = [envelope(stage, 2, 3, (8, 8), 0).grids[i] for i in range(2)]
    assert [noise.shape[2:4] for noise in draws.history_noise] == want
    noises = [pyramid.down_noise(draws.noise, 2 - stage), *draws.history_noise]
    assert all(abs(float(noise.std()) - 1) < 0.05 for noise in noises)
    # Fresh noise for every frame.
    assert abs(float(jnp.mean(noises[0][:, :, :1, :1] * noises[2][:, :, :1, :1]))) < 0.1


def test_stages_are_drawn_evenly():
    drawn = [flow_matching.stage_of_step(3, step, 3) for step in range(3000)]
    assert np.bincount(drawn, minlength=3).min() > 900
    assert drawn[:20] != [flow_matching.stage_of_step(4, step, 3) for step in range(20)]


def test_stages_are_drawn_by_weight():
    drawn = [flow_matching.stage_of_step(3, step, 3, (1, 2, 1)) for step in range(3000)]
    assert np.bincount(drawn) / 3000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert set(flow_matching.stage_of_step(3, step, 3, (0, 1, 0)) for step in range(50)) == {1}


def test_units_are_drawn_by_weight_among_those_that_a_sample_has():
    stop = jnp.asarray([4] * 2000 + [2] * 2000)
    units = np.asarray(flow_matching.draw_units(jax.random.key(0), 1, stop, (1.0, 3.0, 0.0)))
    assert np.bincount(units[:2000], minlength=4) / 2000 == pytest.approx([0, 0.25, 0.75, 0], abs=0.04)
    assert set(units[2000:].tolist()) == {1}


@pytest.mark.parametrize('weights', [(1.0, -1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 2.0), (1.0, float('nan'), 1.0)])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(InputError, match='stage_weights is'):
        flow_matching.check_weights('stage_weights', weights, count=3)


def test_means_by_unit():
    sums = flow_matching.unit_sums(jnp.asarray([1.0, 2.0, 6.0]), jnp.asarray([2, 0, 2]), 3)
    means = flow_matching.unit_means(sums, 'stage1')
    assert list(means) == [f'stage1/unit{unit}' for unit in range(3)]
    assert [float(mean) for mean in means.values()] == pytest.approx([2, np.nan, 3.5], nan_ok=True)
