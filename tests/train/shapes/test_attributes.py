"""Attributes read from pixels: correct for drawn clips, including blurred and noisy ones; errors are detected."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from train.shapes.attributes import Attributes, markdown_table, measure, summarize
from train.shapes.drawing import draw
from train.shapes.masks import border_colors, find_shape
from train.shapes.world import COLORS, CPU, GPU, VIVID, Scene, Traits

EACH = pytest.mark.parametrize('world', [CPU, GPU, VIVID], ids=['cpu', 'gpu', 'vivid'])
COUNT = 24
ASKED = Traits('small', 'red', 'triangle', 'right', '', 'blue')
OTHER = Traits('large', 'yellow', 'circle', 'left', 'quickly', 'black')


def measured(world, frames, size, spoil=lambda clip, rng: clip) -> list[Attributes]:
    """Return the attributes of degraded clips of a world."""
    rng = np.random.default_rng(0)
    scenes = [world.scene(4, index, 'all') for index in range(COUNT)]
    return [measure(spoil(draw(scene, frames, *size), rng), scene.traits, world) for scene in scenes]


def noisy(clip, rng, sigma=20):
    return np.clip(clip + rng.normal(0, sigma, clip.shape), 0, 255).astype(np.uint8)


def blurred(clip, rng=None, radius=1):
    """Blur a picture: average over squares, twice."""
    clip, side = clip.astype(float), 2 * radius + 1
    for _ in range(2):
        for axis in (1, 2):
            margin = [(radius, radius) if a == axis else (0, 0) for a in range(4)]
            padded = np.pad(clip, margin, mode='edge')
            clip = np.lib.stride_tricks.sliding_window_view(padded, side, axis).mean(axis=-1)
    return clip.astype(np.uint8)


@EACH
@pytest.mark.parametrize(('frames', 'size'), [(17, (64, 64)), (33, (64, 96)), (17, (32, 32))])
def test_drawn_clips_are_as_asked(world, frames, size):
    clips = measured(world, frames, size)
    table = summarize(clips)
    for name in (*Traits._fields, 'all'):
        assert table[name].mean == 1
    motions, paths = ([getattr(clip, name) for clip in clips] for name in ('motion', 'path'))
    # Light moves the center of mass a little; pixels of 1/32 more.
    assert np.abs(np.array(motions) - 1).max() < (0.03 if size == (32, 32) else 0.02 if world.shaded else 0.01)
    assert np.abs(np.array(paths) - 1).max() < 0.08
    assert abs(table['path'].mean - 1) < 0.02
    assert table['mismatch'].mean < (0.04 if size == (32, 32) else 0.02)


def test_light_and_texture_stay_within_the_readers_margin():
    for index in range(COUNT):
        scene = VIVID.scene(4, index, 'all')
        shaded, flat = (draw(one, 9, 64, 64).astype(float) for one in (scene, dataclasses.replace(scene, texture=None)))
        background, color = (np.array(COLORS[name]) for name in (scene.traits.background, scene.traits.color))
        off, inside = (flat == background).all(axis=-1), (flat == color).all(axis=-1)
        found = find_shape(shaded, border_colors(shaded))
        assert found is not None
        share, _ = found
        assert share[off].max() < 0.25 and share[inside].min() > 0.75
        # Both are there, and the texture stays in its place.
        assert np.ptp(shaded[inside] @ color) > 0.1 * color @ color
        everywhere = off.all(axis=0)
        moved, varied = np.ptp(shaded[:, everywhere], axis=0), np.ptp(shaded[0, everywhere], axis=0)
        assert moved.max() <= 1 < varied.max()


@EACH
@pytest.mark.parametrize('spoil', [noisy, blurred, lambda clip, rng: noisy(blurred(clip), rng, 10)])
def test_noise_and_blur_leave_attributes_alone(world, spoil):
    table = summarize(measured(world, 33, (64, 64), spoil))
    assert table['all'].mean == 1
    assert abs(table['motion'].mean - 1) < 0.02
    assert 0.012 < table['mismatch'].mean < 0.25  # but it is seen


def test_mismatch_grows_with_blur():
    clip = draw(Scene(ASKED), 17, 64, 64)
    drawn, *worse = [measure(blurred(clip, radius=radius) if radius else clip, ASKED, CPU) for radius in range(4)]
    mismatches = [drawn.mismatch, *(clip.mismatch for clip in worse)]
    assert mismatches == sorted(mismatches) and mismatches[0] < 0.02 and mismatches[-1] > 0.15


@pytest.mark.parametrize('name', Traits._fields)
def test_one_wrong_attribute_is_the_only_one(name):
    shown = ASKED._replace(**{name: getattr(OTHER, name)})
    right = measure(draw(Scene(shown), 17, 64, 64), ASKED, GPU).correct()
    wrong = [key for key, value in right.items() if not value]
    assert wrong == [name]


def test_wrong_shape_has_a_large_mismatch():
    for shown in ('circle', 'square'):
        clip = measure(draw(Scene(ASKED._replace(shape=shown)), 17, 64, 64), ASKED, CPU)
        assert clip.shape == shown and clip.mismatch > 0.25 and clip.steady == 1
    two = np.maximum(draw(Scene(ASKED, (0.1, 0.1)), 17, 96, 96), draw(Scene(ASKED, (0.9, 0.9)), 17, 96, 96))
    assert measure(two, ASKED, CPU).mismatch > 0.8


def test_a_shape_that_changes_within_the_clip_is_not_steady():
    before, after = (draw(Scene(ASKED._replace(shape=shape)), 17, 64, 64) for shape in ('circle', 'square'))
    changed = measure(np.concatenate([before[:14], after[14:]]), ASKED, CPU)
    assert changed.shape == 'circle' and changed.steady == 0


def test_motion_is_measured_against_the_caption():
    clip = draw(Scene(ASKED, (0.5, 0.5)), 33, 64, 64)
    assert measure(clip[::-1], ASKED, CPU).motion == pytest.approx(-1, abs=0.01)
    assert measure(clip[::-1], ASKED, CPU).direction == 'left'
    # Half of the way, in the same time.
    half = measure(np.repeat(clip[:17], 2, axis=0)[1:], ASKED, CPU)
    assert half.motion == pytest.approx(0.5, abs=0.03) and half.path == pytest.approx(0.5, abs=0.03)
    assert half.direction == 'right' and half.speed is None
    still = measure(np.repeat(clip[:1], 33, axis=0), ASKED, CPU)
    assert (still.direction, still.speed) == (None, None)
    assert still.motion == pytest.approx(0, abs=1e-6) and still.path == pytest.approx(0, abs=1e-6)
    assert still.shape == 'triangle' and still.color == 'red'
    # Up and to the right at once is neither.
    oblique = np.stack([np.roll(frame, -round(i / 2), axis=0) for i, frame in enumerate(clip)])
    assert measure(oblique, ASKED, CPU).direction is None


def test_path_follows_turns_and_motion_looks_at_the_time_before():
    turned = Scene(ASKED, (0.5, 0.5), ((0.4, 'down'), (0.7, 'left')))
    clip = measure(draw(turned, 49, 64, 64), ASKED, GPU)
    assert all(clip.correct().values())
    assert clip.motion == pytest.approx(1, abs=0.01) and clip.path == pytest.approx(1, abs=0.02)
    # A shape that stops after a third keeps its motion, not its path.
    frozen = draw(Scene(ASKED), 49, 64, 64)
    frozen[17:] = frozen[16]
    stopped = measure(frozen, ASKED, GPU)
    assert stopped.motion == pytest.approx(1, abs=0.01) and stopped.path == pytest.approx(1 / 3, abs=0.02)


def test_garbage_is_wrong_and_does_not_crash():
    rng = np.random.default_rng(1)
    drawn = draw(Scene(ASKED), 17, 64, 64)
    vanishing = drawn.copy()
    vanishing[5] = vanishing[5, 0, 0] if (drawn[5, 0, 0] == drawn[5, -1, -1]).all() else 0
    clips = {
        'noise': rng.integers(0, 256, drawn.shape).astype(np.uint8),
        'black': np.zeros_like(drawn),
        'white': np.full_like(drawn, 255),
        'flashing': np.where(np.arange(17)[:, None, None, None] % 2, 255, drawn).astype(np.uint8),
        'frames in disorder': drawn[rng.permutation(17)],
        'no shape in one frame': vanishing,
        'gradient': np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None] * 4, drawn.shape).copy(),
    }
    for name, clip in clips.items():
        result = measure(clip, ASKED, CPU)
        assert not all(result.correct().values()), name
        assert all(math.isfinite(value) for value in result[-5:]), name
        if name != 'frames in disorder':
            assert result.direction is None and result.motion == 0, name
    black = measure(clips['black'], ASKED, CPU)
    assert black.background == 'black' and black.color is None and black.mismatch == 1
    # The visible attributes are still read.
    assert measure(vanishing, ASKED, CPU).color == 'red'


def test_summary():
    good = measure(draw(Scene(ASKED), 17, 64, 64), ASKED, CPU)
    bad = good._replace(color='green', motion=0.0)
    table = summarize([good, good, good, bad])
    assert table['color'].mean == 0.75 and table['all'].mean == 0.75 and table['size'] == (1, 0)
    # The standard error of the mean of 1, 1, 1, 0, by hand.
    assert table['color'].error == pytest.approx(math.sqrt(0.25 / 4))
    assert table['motion'].mean == pytest.approx(0.75 * good.motion)
    assert math.isnan(summarize([good])['motion'].error)
    text = markdown_table({'truth': summarize([good]), 'student': table}).splitlines()
    assert len({line.count('|') for line in text}) == 1
    assert text[2].startswith('| truth | 1.000 |') and '0.750 ± 0.250' in text[3]
    with pytest.raises(InputError, match='no clips to summarize'):
        summarize([])


def test_bad_clips():
    clip = draw(Scene(ASKED), 17, 64, 64)
    with pytest.raises(InputError, match='give RGB bytes'):
        measure(clip / 255, ASKED, CPU)
    with pytest.raises(InputError, match='2 frames of 64x64; give at least 3'):
        measure(clip[:2], ASKED, CPU)
    with pytest.raises(InputError, match='3 frames of 64x64; give at least 4'):
        measure(clip[:3], ASKED, GPU)
    assert measure(draw(Scene(ASKED), 4, 64, 64), ASKED, GPU).motion == pytest.approx(1, abs=0.02)
    with pytest.raises(InputError, match="size 'large' does not occur"):
        measure(clip, ASKED._replace(size='large'), CPU)
