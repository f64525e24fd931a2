"""Cutting clips: frames by their times, places of the clips, sizes, orientation, and the stored form."""

from __future__ import annotations

import fractions

import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from support.video_folder import movie, turned
from train.data import mp4_bytes, video_files
from train.data.video_files import Footage, Unusable, choose_size, cut, ticks


def test_ticks_depend_on_times_alone():
    np.testing.assert_array_equal(ticks(np.arange(49) / 24), np.arange(49))
    np.testing.assert_array_equal(ticks(np.arange(49) * 1001 / 24000), np.arange(49))
    np.testing.assert_array_equal(ticks(np.round(np.arange(49) / 24, 3)), np.arange(49))  # as in Matroska
    np.testing.assert_array_equal(ticks(np.arange(11) / 30), [0, 1, 2, 4, 5, 6, 7, 9, 10])
    np.testing.assert_array_equal(ticks(5 + np.arange(21) / 60), [0, 2, 5, 7, 10, 12, 15, 17, 20])
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.uniform(0.005, 0.1, 200))
    moments = times[0] + np.arange(len(ticks(times))) / 24
    np.testing.assert_array_equal(ticks(times), np.abs(times - moments[:, None]).argmin(axis=1))
    assert moments[-1] <= times[-1] + 0.05 < moments[-1] + 0.1


def test_clips_are_spread_and_do_not_overlap():
    footage = Footage(np.arange(100) / 24, 64, 64)
    starts = lambda clips: [int(clip[0]) for clip in cut(footage, 9, clips, 23)]
    assert starts(1) == [46]
    assert set(np.diff([-9, *starts(3), 100]) - 9) == {18, 19}  # frames between clips, and at both ends
    assert len(starts(1000)) == 11
    assert (np.diff(starts(1000)) >= 9).all()
    assert [len(clip) for clip in cut(Footage(np.arange(9) / 24, 64, 64), 9, 5, 23)] == [9]
    with pytest.raises(Unusable, match='too short: 8 frames'):
        cut(Footage(np.arange(8) / 24, 64, 64), 9, 5, 23)


def test_the_frame_rate_is_that_of_most_of_the_file():
    alternating = np.cumsum([0, *(50 if number % 2 else 16 for number in range(60))]) / 1000
    assert len(cut(Footage(alternating, 64, 64), 9, 1, 23)) == 1
    with pytest.raises(Unusable, match='20 frames per second, fewer than 23'):
        cut(Footage(np.arange(60) / 20, 64, 64), 9, 1, 23)
    with pytest.raises(Unusable, match='no frame from'):
        cut(Footage(np.r_[np.arange(6), 10 + np.arange(6)] / 24, 64, 64), 9, 1, 23)


def test_size_keeps_most_without_enlarging():
    choose = lambda height, width: choose_size(Footage(np.zeros(1), height, width), [(64, 128), (128, 64), (128, 256)])
    assert choose(100, 180) == (64, 128)
    assert choose(300, 500) == (128, 256)
    assert choose(127, 2000) == (64, 128)
    assert choose(200, 120) == (128, 64)
    with pytest.raises(Unusable, match='63x127 pixels, smaller'):
        choose(63, 127)


def test_turned_and_stretched_videos_are_shown_as_players_do(tmp_path):
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, :64, 0] = 200  # red on the left
    upright = movie(tmp_path / 'a.mp4', picture=picture, size=(64, 128))
    turned(tmp_path / 'turned.mp4', upright)
    footage = video_files.inspect(tmp_path / 'turned.mp4')
    assert (footage.height, footage.width) == (128, 64)
    (clip,) = video_files.read_clips(tmp_path / 'turned.mp4', [[0, 3]], (128, 64))
    assert clip[:, :60, :, 0].min() > 150  # rotated clockwise: the left side is on top
    assert clip[:, 68:, :, 0].max() < 50
    wide = movie(tmp_path / 'b.mp4', picture=picture, size=(64, 128), sample_aspect_ratio=fractions.Fraction(2, 1))
    assert (video_files.inspect(wide).height, video_files.inspect(wide).width) == (64, 256)
    (clip,) = video_files.read_clips(wide, [[0]], (64, 64))
    # The middle quarter of the shown width: 32 stored columns, the border in the middle.
    assert clip[0, :, :30, 0].min() > 150
    assert clip[0, :, 34:, 0].max() < 50


def test_stored_clips_are_close_to_their_frames():
    ramp = np.linspace(0, 255, 128).astype(np.uint8)
    frames = np.stack([np.roll(np.broadcast_to(ramp[None, :, None], (64, 128, 3)), 3 * t, axis=1) for t in range(5)])
    difference = mp4_bytes.decode(mp4_bytes.encode(frames, 24, 12), 5, 'x').astype(float) - frames
    assert 10 * np.log10(255**2 / np.mean(difference**2)) > 38
    with pytest.raises(InputError, match=r'x: the clip has 5 frames, not 6'):
        mp4_bytes.decode(mp4_bytes.encode(frames, 24, 12), 6, 'x')
    with pytest.raises(InputError, match=r'x: the clip cannot be decoded'):
        mp4_bytes.decode(b'\0' * 100, 5, 'x')
