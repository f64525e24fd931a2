"""Motion by unit and variety of direction, on synthetic tracks and on drawn clips."""

from __future__ import annotations

import math

import numpy as np
import pytest

from train.shapes.captions import caption
from train.shapes.motion import displacements, heading, motion_of, spread, variety
from train.shapes.source import MovingShapesSource
from train.shapes.world import COLLAPSE, DIRECTIONS, SPEEDS

FRAMES, UNITS = 65, 8


def straight(speed: float, direction=(1.0, 0.0), frames: int = FRAMES) -> np.ndarray:
    """Return a track with the same step in every frame."""
    return np.arange(frames)[:, None] * speed * np.asarray(direction)


def test_a_steady_track_has_equal_displacements():
    assert displacements(straight(0.01)) == pytest.approx([0.08] * UNITS)
    assert heading(straight(0.01, (0.0, -1.0)), 0.5) == pytest.approx([0, -1])


def test_collapse_shows_in_the_units_that_have_lost_the_motion():
    """The shape stops at frame 40, the end of unit 5."""
    track = straight(0.01)
    track[40:] = track[40]
    assert displacements(track) == pytest.approx([0.08] * 5 + [0.0] * 3)
    fading = np.cumsum(0.01 * 0.5 ** (np.arange(FRAMES) / 16))[:, None] * [1.0, 0.0]
    ratios = displacements(fading)[1:] / displacements(fading)[:-1]
    assert ratios == pytest.approx([0.5 ** (8 / 16)] * (UNITS - 1))


def test_a_turn_between_two_frames_keeps_the_way():
    track = straight(0.01)
    track[32:] = track[32] + straight(0.01, (0.0, 1.0), FRAMES - 32)
    assert displacements(track) == pytest.approx([0.08] * UNITS)
    assert heading(track, 0.5) == pytest.approx([1, 0])


def test_variety_of_known_directions():
    four = np.asarray(list(DIRECTIONS.values()), float)
    same = np.tile(four[:1], (4, 1))
    # Three of four opposite or orthogonal pairs: the mean product of different directions is -1/3.
    assert variety(four, ['a'] * 4) == pytest.approx(4 / 3)
    assert variety(same, ['a'] * 4) == pytest.approx(0)
    assert variety(np.concatenate([four, same]), ['a'] * 4 + ['b'] * 4) == pytest.approx(2 / 3)
    assert math.isnan(variety(four, ['a', 'b', 'c', 'd']))
    drawn = four[np.random.default_rng(0).integers(4, size=4000)]
    assert variety(drawn, np.repeat(np.arange(100), 40).tolist()) == pytest.approx(1, abs=0.05)
    # A still clip has no direction and so no common one.
    assert heading(straight(0.0), 0.5) == pytest.approx([0, 0])


def test_spread_is_lost_by_short_ways_and_variety_is_not():
    four = np.asarray(list(DIRECTIONS.values()), float)
    # Squared lengths of 1 about a mean of 0, over three degrees of freedom.
    assert spread(four, ['a'] * 4) == pytest.approx(4 / 3)
    assert spread(four / 2, ['a'] * 4) == pytest.approx(1 / 3)
    assert spread(np.tile(four[:1], (4, 1)), ['a'] * 4) == pytest.approx(0)
    assert math.isnan(spread(four, ['a', 'b', 'c', 'd']))


def test_drawn_clips_of_the_world_are_read_right():
    source = MovingShapesSource(COLLAPSE, FRAMES, (64, 64), seed=1, count=6)
    for index in range(len(source)):
        traits = source.scene(index).traits
        seen = motion_of(source[index]['video'], COLLAPSE.steady)
        assert seen.heading == pytest.approx(DIRECTIONS[traits.direction], abs=0.02)
        wanted = SPEEDS[traits.speed] / UNITS
        # A turn cuts a corner in the half unit in which it falls.
        assert np.sum(np.abs(seen.displacement / wanted - 1) < 0.05) >= UNITS - 1
        assert seen.displacement.min() > 0.8 * wanted
    blank = np.zeros((FRAMES, 64, 64, 3), np.uint8)
    assert not np.any(motion_of(blank, 0.5).displacement)


def test_captions_tell_neither_direction_nor_speed():
    traits = COLLAPSE.combinations('train')
    told = {caption(COLLAPSE.captioned(one)) for one in traits}
    assert len(told) == len({(one.color, one.shape, one.background) for one in traits})
    assert 'a small red circle moves on a blue background' in told
    wordings = {caption(COLLAPSE.captioned(traits[0]), seed) for seed in range(50)}
    words = {word for wording in wordings for word in wording.replace(',', '').split()}
    assert not words & {*DIRECTIONS, 'slowly', 'quickly', 'to', 'upwards', 'downwards'}
