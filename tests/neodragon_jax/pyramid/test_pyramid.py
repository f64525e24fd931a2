"""Tests of pyramid and history against the reference, and of the identities of block noise and envelope."""

from __future__ import annotations

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.history import envelope, envelope_frame_ids, envelope_history, history
from neodragon_jax.pyramid.layout import attention_mask, layout_of, patchify, position_ids, unpatchify
from neodragon_jax.pyramid.schedule import Schedule
from neodragon_jax.pyramid.stages import block_noise, color_noise, down, down_noise, enter_stage, levels, stage_pair, up
from support.goldens import GOLDENS, channels_last, load_golden, relative_error


@pytest.fixture(scope='module')
def golden() -> dict[str, np.ndarray]:
    return load_golden('scheduler')


@pytest.mark.parametrize('case', [0, 1, 2])
def test_noise_is_halved_as_in_the_reference(golden, case):
    got = down_noise(jnp.asarray(channels_last(golden[f'down_noise{case}/in'])), int(golden[f'down_noise{case}/times']))
    assert relative_error(got, channels_last(golden[f'down_noise{case}/out'])) < 1e-6


@pytest.mark.parametrize('case', [0, 1, 2])
def test_levels(golden, case):
    source = jnp.asarray(channels_last(golden[f'down_noise{case}/in']))
    for level, got in enumerate(levels(source, 3)):
        assert relative_error(got, channels_last(golden[f'pyramid{case}/level{level}'])) < 1e-6


@pytest.mark.parametrize('case', ['upsample0/s1', 'upsample0/s2', 'upsample1/s1', 'upsample1/s2'])
def test_entering_a_stage(golden, case):
    x, noise = (jnp.asarray(channels_last(golden[f'{case}/{name}'])) for name in ('in', 'block_noise'))
    got = enter_stage(x, noise, int(case[-1]), Schedule())
    assert relative_error(got, channels_last(golden[f'{case}/out'])) < 1e-6


def past_cases() -> list[tuple[int, int, int]]:
    config = json.loads((GOLDENS / 'scheduler' / 'config.json').read_text())
    names = [key.split('_') for key in config if key.startswith('past_fpu')]
    return [(int(fpu[3:]), int(unit[1:]), int(stage[1:])) for _, fpu, unit, stage in names]


@pytest.mark.parametrize(('frames_per_unit', 'unit', 'stage'), past_cases())
def test_history_clips(golden, frames_per_unit, unit, stage):
    case = f'past_fpu{frames_per_unit}/u{unit}'
    clips = history(jnp.asarray(channels_last(golden[f'{case}/history'])), stage, 3, frames_per_unit)
    assert f'{case}/s{stage}/clip{len(clips)}' not in golden
    for number, clip in enumerate(clips):
        assert relative_error(clip, channels_last(golden[f'{case}/s{stage}/clip{number}'])) < 1e-6


def test_history_of_a_batch_that_guidance_doubles(golden):
    once = channels_last(golden['past_fpu2/u6/history'])
    clips = history(jnp.asarray(np.concatenate([once, once])), 0, 3, 2)
    assert relative_error(clips[0], channels_last(golden['past_cfg/s0_clip0'])) < 1e-6


@pytest.mark.parametrize('gamma', ['0.3333', '0.2500'])
def test_block_noise_is_the_symmetric_root_of_its_covariance(golden, gamma):
    """The map white -> colored, read off one block, is the reference's square root."""
    value = 1 / 3 if gamma == '0.3333' else 0.25
    columns = [
        color_noise(jnp.asarray(basis.reshape(2, 2, 1)), value).reshape(4) for basis in np.eye(4, dtype=np.float32)
    ]
    root = np.stack(columns, axis=1)
    assert relative_error(root, golden[f'f64/block_noise/sym_sqrt_gamma{gamma}']) < 1e-6
    assert relative_error(root @ root.T, golden[f'f64/block_noise/cov_gamma{gamma}']) < 1e-6


def test_block_noise_statistics():
    noise = np.asarray(block_noise(jax.random.key(0), (64, 32, 32, 4)))
    blocks = noise.reshape(64, 16, 2, 16, 2, 4).transpose(0, 1, 3, 5, 2, 4).reshape(-1, 4)
    covariance = blocks.T @ blocks / len(blocks)
    np.testing.assert_allclose(covariance, np.eye(4) * 4 / 3 - 1 / 3, atol=0.02)
    np.testing.assert_allclose(blocks.sum(axis=1), 0, atol=1e-5)


def test_block_noise_of_a_full_size_unit_takes_milliseconds():
    draw = jax.jit(lambda key: block_noise(key, (1, 1, 40, 64, 16)))
    draw(jax.random.key(0)).block_until_ready()
    start = time.perf_counter()
    draw(jax.random.key(1)).block_until_ready()
    assert time.perf_counter() - start < 0.05


def test_pair_meets_the_next_stage():
    """A stage starts where the previous one ends: alpha Up(end) has the signal of the next start."""
    schedule = Schedule()
    clean = jax.random.normal(jax.random.key(0), (1, 1, 8, 8, 2))
    zero = jnp.zeros_like(clean)
    for stage in (1, 2):
        _, end = stage_pair(down(clean), down(zero), stage - 1, schedule)
        start, _ = stage_pair(clean, zero, stage, schedule)
        alpha, _ = schedule.upsample_coefficients(stage)
        np.testing.assert_allclose(alpha * up(end), start, rtol=1e-4, atol=1e-5)


def test_pair_of_the_first_and_the_last_stage():
    clean, noise = (jax.random.normal(jax.random.key(i), (1, 1, 4, 4, 2)) for i in (0, 1))
    assert relative_error(stage_pair(clean, noise, 0, Schedule())[0], noise) == 0
    assert relative_error(stage_pair(clean, noise, 2, Schedule())[1], clean) == 0


@pytest.mark.parametrize('stage', [0, 1, 2])
def test_envelope_holds_every_unit(stage):
    """Dropping the padding of the envelope gives the history clips, frame by frame."""
    video = jax.random.normal(jax.random.key(0), (2, 7, 8, 16, 3))
    layout = envelope(stage, 6, 3, (4, 8), 5)
    for unit in range(7):
        frames = envelope_history(levels(video, 3), jnp.array([unit, unit]), stage, 6)
        ids = np.asarray(envelope_frame_ids(jnp.array([unit, unit]), 6))
        clips = history(video[:, :unit], stage, 3)
        real = [frame for frame, index in zip(frames, ids[0], strict=False) if index >= 0]
        singles = [clip[:, i : i + 1] for clip in clips for i in range(clip.shape[1])]
        assert len(real) == len(singles) == unit
        for got, want in zip(real, singles, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-6)
        for frame in frames[: 6 - unit]:
            assert not np.any(frame)
        assert tuple(np.array([f.shape[2:4] for f in frames]).flatten() // 2) == tuple(
            np.array(layout.grids[:-1]).flatten()
        )


def test_envelope_units_may_differ_per_example():
    video = jax.random.normal(jax.random.key(0), (2, 5, 8, 16, 3))
    both = envelope_history(levels(video, 3), jnp.array([1, 4]), 2, 4)
    for row, unit in enumerate((1, 4)):
        alone = envelope_history(levels(video[row : row + 1], 3), jnp.array([unit]), 2, 4)
        for got, want in zip(both, alone, strict=True):
            np.testing.assert_array_equal(got[row : row + 1], want)


def test_envelope_sizes_at_full_size():
    """408, 648 and 1728 tokens with 128 of text: the static shapes that a phone runs."""
    assert [envelope(stage, 6, 3, (20, 32), 128).tokens for stage in range(3)] == [408, 648, 1728]


def test_masks_and_positions_of_the_envelope_match_the_unpadded_sequence():
    text_mask = jnp.array([[1, 1, 1, 0]])
    video = jnp.zeros((1, 3, 8, 16, 3))
    plain = layout_of([*history(video[:, :2], 1, 3), jnp.zeros((1, 1, 4, 8, 3))], 2, 4)
    padded = envelope(1, 6, 3, (4, 8), 4)
    ids = position_ids(plain, jnp.arange(3)[None])
    wide = position_ids(padded, envelope_frame_ids(jnp.array([2]), 6))
    real = np.concatenate([np.ones(4, bool), np.asarray(wide[0, 4:]) >= 0])
    np.testing.assert_array_equal(wide[:, real], ids)
    mask, wide_mask = attention_mask(ids, text_mask), attention_mask(wide, text_mask)
    np.testing.assert_array_equal(np.asarray(wide_mask)[:, :, real][:, :, :, real], mask)
    valid = real & np.concatenate([np.asarray(text_mask[0], bool), np.ones(len(real) - 4, bool)])
    assert not np.asarray(wide_mask)[0, 0][valid][:, ~real].any(), 'a real token attends to padding'


def test_patchify_round_trip():
    clip = jax.random.normal(jax.random.key(0), (2, 3, 4, 6, 5))
    np.testing.assert_array_equal(unpatchify(patchify(clip, 2), 2, (2, 3)), clip)


def test_bad_sizes_are_named():
    with pytest.raises(InputError, match='5x8'):
        layout_of([jnp.zeros((1, 1, 5, 8, 3))], 2, 4)
    with pytest.raises(InputError, match='6x8'):
        envelope(2, 6, 3, (6, 8), 4)
    with pytest.raises(InputError, match='1x4'):
        down(jnp.zeros((1, 1, 1, 4, 1)))
