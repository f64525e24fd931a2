"""The second reader of shapes: it agrees with what was drawn in every world, and finds a wrong shape."""

from __future__ import annotations

import numpy as np
import pytest

from train.shapes.drawing import draw
from train.shapes.fill import FILLS, Filled, read_fill
from train.shapes.world import REACHES, WORLDS

COUNT = 40


@pytest.mark.parametrize(('frames', 'size'), [(17, (64, 64)), (9, (128, 128)), (9, (64, 96))])
@pytest.mark.parametrize('name', sorted(WORLDS))
def test_drawn_clips_are_read_as_they_are(name, frames, size):
    scenes = [WORLDS[name].scene(5, index, 'all') for index in range(COUNT)]
    seen = [read_fill(draw(scene, frames, *size)) for scene in scenes]
    assert seen == [Filled(scene.traits.color, scene.traits.shape) for scene in scenes]
    assert {scene.traits.shape for scene in scenes} == set(REACHES) == set(FILLS)


@pytest.mark.parametrize('name', ['cpu', 'vivid'])
def test_noise_and_specks_leave_it_alone(name):
    rng = np.random.default_rng(0)
    right = 0
    for index in range(COUNT):
        scene = WORLDS[name].scene(5, index, 'all')
        clip = draw(scene, 9, 64, 64)
        specks = rng.random(clip.shape[:3]) < 0.002
        clip = np.where(specks[..., None], 255 - clip, clip)
        clip = np.clip(clip + rng.normal(0, 12, clip.shape), 0, 255).astype(np.uint8)
        right += read_fill(clip).shape == scene.traits.shape
    assert right >= 0.95 * COUNT


def test_a_plain_picture_has_no_shape():
    assert read_fill(np.full((9, 64, 64, 3), 15, np.uint8)) == Filled(None, None)
