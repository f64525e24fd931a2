"""Tests of clip and picture files."""

from __future__ import annotations

import fractions
import os
import pathlib

import av
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageCms

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import (
    image_to_frame,
    picture_to_frame,
    read_image,
    read_mp4,
    to_uint8,
    write_contact_sheet,
    write_mp4,
)
from support.color_profiles import exchanged_profile, linear_profile
from support.goldens import load_golden
from support.png_tags import TAGS, with_chunks

COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 64, 200]], np.uint8)


def moving_bars(frames: int = 12, height: int = 32, width: int = 96) -> np.ndarray:
    """Return a clip of colored bars that move to the right by two pixels a frame."""
    row = np.repeat(COLORS, width // len(COLORS), axis=0)
    rows = np.stack([np.roll(row, 2 * index, axis=0) for index in range(frames)])
    return np.broadcast_to(rows[:, None], (frames, height, width, 3)).copy()


def names(folder: pathlib.Path) -> list[str]:
    return sorted(os.listdir(folder))


# --- clips -------------------------------------------------------------------------------------------------------


def test_to_uint8_truncates():
    golden = load_golden('video_vae')
    assert np.array_equal(to_uint8(golden['u8/float_in']), golden['u8/float_to_uint8'])
    for frames in (1, 3):
        name = f'decode_latent_T{frames}/frames'
        assert np.array_equal(to_uint8(golden[f'{name}_float_BT_H_W_C']), golden[f'{name}_uint8'])
    assert to_uint8(jnp.full((1, 1, 3), 5.0, jnp.bfloat16)).tolist() == [[[255, 255, 255]]]


def test_to_uint8_refuses_values_that_are_no_numbers():
    with pytest.raises(InputError, match='not numbers'):
        to_uint8(np.array([[[0.0, np.nan, 0.0]]], np.float32))


def test_mp4_round_trip(tmp_path):
    clip = moving_bars()
    write_mp4(tmp_path / 'new' / 'clip.mp4', clip)
    assert names(tmp_path / 'new') == ['clip.mp4']
    got = read_mp4(tmp_path / 'new' / 'clip.mp4').astype(int)
    assert got.shape == clip.shape
    # Colors are preserved except at the edges of the bars, where the halved color resolution blurs them.
    column = np.arange(8, 96, 16)
    for index in range(len(clip)):
        shifted = (column + 2 * index) % 96
        assert np.abs(got[index][:, shifted] - COLORS).max() <= 6, index


def test_mp4_declares_rate_and_colors(tmp_path):
    for fps, rate in ((24, fractions.Fraction(24)), (24000 / 1001, fractions.Fraction(24000, 1001))):
        write_mp4(tmp_path / 'clip.mp4', moving_bars(), fps)
        with av.open(str(tmp_path / 'clip.mp4')) as container:
            stream = container.streams.video[0]
            assert (stream.average_rate, stream.frames, stream.codec_context.pix_fmt) == (rate, 12, 'yuv420p')
            bt709, limited = 1, 1
            assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (bt709, limited)


@pytest.mark.parametrize(
    ('frames', 'words'),
    [
        (np.zeros((2, 31, 32, 3), np.uint8), '31 high and 32 wide; mp4 needs even sizes: crop or pad'),
        (np.zeros((0, 32, 32, 3), np.uint8), 'not empty'),
        (np.zeros((2, 32, 32, 4), np.uint8), r'got uint8 \[2, 32, 32, 4\]'),
        (np.zeros((2, 32, 32, 3), np.float32), 'got float32'),
    ],
)
def test_mp4_refuses_bad_frames(tmp_path, frames, words):
    with pytest.raises(InputError, match=words):
        write_mp4(tmp_path / 'clip.mp4', frames)
    assert not names(tmp_path)


def test_mp4_refuses_a_bad_rate(tmp_path):
    with pytest.raises(InputError, match='fps is 0'):
        write_mp4(tmp_path / 'clip.mp4', moving_bars(), fps=0)


def test_truncated_mp4_is_refused(tmp_path):
    write_mp4(tmp_path / 'whole.mp4', moving_bars(24))
    content = (tmp_path / 'whole.mp4').read_bytes()
    cut = tmp_path / 'cut.mp4'
    for size in (0, 20, len(content) // 2, len(content) - 1):
        cut.write_bytes(content[:size])
        with pytest.raises(InputError, match=r'cut\.mp4'):
            read_mp4(cut)


def test_mp4_with_fewer_frames_than_declared_is_refused(tmp_path):
    """Cut between two frames, which FFmpeg does not report."""
    write_mp4(tmp_path / 'whole.mp4', moving_bars(24))
    with av.open(str(tmp_path / 'whole.mp4')) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    end = packets[10].pos
    assert end == sum(packet.size for packet in packets[:10]) + (packets[0].pos or 0)
    (tmp_path / 'cut.mp4').write_bytes((tmp_path / 'whole.mp4').read_bytes()[:end])
    with pytest.raises(InputError, match=r'cut\.mp4 cannot be read .*truncated: declares 24 frames, holds 10'):
        read_mp4(tmp_path / 'cut.mp4')


def test_sound_that_outlasts_the_frames_is_no_truncation(tmp_path):
    """Matroska declares no count of frames, and the duration of the file is that of its longest track."""
    with av.open(str(tmp_path / 'a.mkv'), 'w') as container:
        stream = container.add_stream('libx264', rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 32, 'yuv420p'
        sound = container.add_stream('libopus', rate=48000)
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format='rgb24')))
        container.mux(stream.encode())
        for start in range(0, 96_000, 960):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.int16), format='s16', layout='stereo')
            silence.sample_rate, silence.pts = 48000, start
            container.mux(sound.encode(silence))
        container.mux(sound.encode())
    assert read_mp4(tmp_path / 'a.mkv').shape == (12, 32, 32, 3)


def test_files_that_are_no_clips_are_refused(tmp_path):
    (tmp_path / 'text.mp4').write_text('not a clip')
    for path in (tmp_path, tmp_path / 'text.mp4', tmp_path / 'absent.mp4'):
        with pytest.raises(InputError, match=path.name):
            read_mp4(path)
    with av.open(str(tmp_path / 'sound.wav'), 'w') as container:
        stream = container.add_stream('pcm_s16le', rate=8000, layout='mono')
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format='s16', layout='mono')
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(InputError, match='no video in it'):
        read_mp4(tmp_path / 'sound.wav')


def test_contact_sheet(tmp_path):
    """Tiles are the first, the last and evenly spaced frames; labels stand above them."""
    clip = np.zeros((49, 40, 400, 3), np.uint8) + np.arange(49, dtype=np.uint8)[:, None, None, None]
    write_contact_sheet(tmp_path / 'sheet.png', clip, columns=2, tiles=5)
    assert names(tmp_path) == ['sheet.png']
    sheet = np.array(Image.open(tmp_path / 'sheet.png'))
    width, height = 384, 38
    assert sheet.shape == (6 + 3 * (height + 26), 6 + 2 * (width + 6), 3)
    for position, frame in enumerate([0, 12, 24, 36, 48]):
        left, top = 6 + position % 2 * (width + 6), 6 + position // 2 * (height + 26)
        label, tile = sheet[top : top + 20, left : left + width], sheet[top + 20 :, left : left + width][:height]
        assert (tile == frame).all()
        assert (label < 128).any() and (label == 255).any()
    assert (sheet[-height - 6 :, width + 12 :] == 255).all()  # The sixth tile is empty.


def test_contact_sheet_of_small_and_short_clips(tmp_path):
    write_contact_sheet(tmp_path / 'sheet.png', moving_bars(3, 16, 48))
    with Image.open(tmp_path / 'sheet.png') as sheet:
        assert sheet.size == (6 + 3 * (192 + 6), 6 + 64 + 26)
    with pytest.raises(InputError, match='not empty'):
        write_contact_sheet(tmp_path / 'sheet.png', moving_bars()[:0])


# --- pictures ----------------------------------------------------------------------------------------------------


def test_first_frame_is_resized_like_the_reference():
    golden = load_golden('ar_loop')
    want = golden['hybrid_111_resize/in/image_resized_uint8_hwc']
    frame = image_to_frame(golden['hybrid_111_resize/in/image_uint8_hwc'], *want.shape[:2])
    assert frame.dtype == np.float32
    assert np.array_equal(np.round((frame + 1) * 127.5).astype(np.uint8), want)
    same = golden['hybrid_111/in/image_uint8_hwc']
    resized = image_to_frame(same, *same.shape[:2])
    assert np.array_equal(np.round((resized + 1) * 127.5).astype(np.uint8), same)


def test_picture_scaling():
    golden = load_golden('video_vae')
    image = np.repeat(golden['u8/img'].reshape(16, 16, 1), 3, axis=2)
    assert np.array_equal(image_to_frame(image, 16, 16)[..., 0].reshape(-1), golden['u8/normalised'])


def test_picture_that_is_not_rgb_bytes_is_refused():
    with pytest.raises(InputError, match=r'image: got float32 \[8, 8, 3\]'):
        image_to_frame(np.zeros((8, 8, 3), np.float32), 8, 8)


def test_read_image(tmp_path):
    pixels = moving_bars(1)[0]
    Image.fromarray(pixels).save(tmp_path / 'rgb.png')
    assert np.array_equal(read_image(tmp_path / 'rgb.png'), pixels)
    Image.fromarray(pixels[..., 0]).save(tmp_path / 'gray.png')
    assert np.array_equal(read_image(tmp_path / 'gray.png'), np.repeat(pixels[..., :1], 3, axis=2))
    orientation, quarter_turn = 0x0112, 6
    exif = Image.Exif()
    exif[orientation] = quarter_turn
    Image.fromarray(pixels).save(tmp_path / 'turned.png', exif=exif)
    assert np.array_equal(read_image(tmp_path / 'turned.png'), np.rot90(pixels, -1))


def test_unreadable_pictures_are_refused(tmp_path):
    Image.fromarray(moving_bars(1)[0]).save(tmp_path / 'whole.png')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'whole.png').read_bytes()[:80])
    (tmp_path / 'text.png').write_text('not a picture')
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / 'deep.png')
    for name in ('cut.png', 'text.png', 'deep.png', 'absent.png'):
        with pytest.raises(InputError, match=name):
            read_image(tmp_path / name)


def test_transparent_pictures_show_a_white_background(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0] = 200  # the hidden color
    pixels[:2, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / 'rgba.png')
    got = read_image(tmp_path / 'rgba.png')
    assert (got[:2] == [200, 0, 0]).all() and (got[2:] == 255).all()


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P'])
def test_colors_are_those_of_the_profile(tmp_path, mode):
    picture = Image.new(mode, (8, 8), 'red')
    picture.save(tmp_path / 'a.png', icc_profile=exchanged_profile())
    assert np.abs(read_image(tmp_path / 'a.png').astype(int) - [0, 0, 255]).max() < 8
    for profile in (None, ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes(), b'damaged'):
        picture.save(tmp_path / 'a.png', icc_profile=profile)
        assert (read_image(tmp_path / 'a.png') == [255, 0, 0]).all()


@pytest.mark.parametrize('name', ['GIMP built-in Linear sRGB', 'another'])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_a_profile_is_judged_by_its_colors_and_not_by_its_name(tmp_path, mode, name):
    Image.new(mode, (8, 8), 'gray').save(tmp_path / 'a.png', icc_profile=linear_profile(name))
    linear = 128 / 255
    assert np.abs(read_image(tmp_path / 'a.png') - 255 * (1.055 * linear ** (1 / 2.4) - 0.055)).max() < 2


@pytest.mark.parametrize('kind', TAGS)
def test_tags_of_other_colors_are_refused(tmp_path, kind):
    chunks, usual = TAGS[kind]
    Image.new('RGB', (8, 8), (200, 100, 50)).save(tmp_path / 'a.png')
    (tmp_path / 'a.png').write_bytes(with_chunks((tmp_path / 'a.png').read_bytes(), chunks))
    if usual:
        assert (read_image(tmp_path / 'a.png') == [200, 100, 50]).all()
    else:
        with pytest.raises(
            InputError, match=r'a\.png has other colors than sRGB \((cICP|gAMA|cHRM) .*convert it to sRGB'
        ):
            read_image(tmp_path / 'a.png')


def test_a_tag_goes_before_the_profile_and_the_profile_before_others(tmp_path):
    """The order of the PNG specification: cICP, profile, sRGB, gAMA and cHRM."""
    path = tmp_path / 'a.png'
    Image.new('RGB', (8, 8), 'red').save(path, icc_profile=exchanged_profile())
    content = path.read_bytes()
    path.write_bytes(with_chunks(content, TAGS['gamma 1'][0]))
    assert np.abs(read_image(path).astype(int) - [0, 0, 255]).max() < 8
    path.write_bytes(with_chunks(content, TAGS['sRGB'][0]))
    assert (read_image(path) == [255, 0, 0]).all()


def test_formats_that_may_hold_hdr_are_refused(tmp_path):
    Image.new('RGB', (16, 16), 'red').save(tmp_path / 'a.avif')
    with pytest.raises(InputError, match='give a PNG or JPEG file'):
        read_image(tmp_path / 'a.avif')


def test_pixels_are_counted_before_decoding(tmp_path):
    """A file of a few kilobytes can hold gigabytes of pixels."""
    Image.new('1', (20_000, 20_000)).save(tmp_path / 'large.png')
    assert (tmp_path / 'large.png').stat().st_size < 100_000
    with pytest.raises(InputError, match=r'large\.png has .*pixels'):
        read_image(tmp_path / 'large.png')


def test_a_picture_of_another_shape_is_cropped_and_not_squashed():
    """A disc stays a disc in the first frame, as in the clips of train.captioned_clips."""
    rows, columns = np.mgrid[:200, :120]
    disc = ((rows - 99.5) ** 2 + (columns - 59.5) ** 2 < 40**2)[..., None] * np.full(3, 255, np.uint8)
    inside = picture_to_frame(disc.astype(np.uint8), 64, 128)[..., 0] > 0
    height, width = inside.any(axis=1).sum(), inside.any(axis=0).sum()
    assert height == 64 and abs(width - 80 * 128 / 120) < 2  # the crop of 120 x 60 pixels, enlarged
    square = picture_to_frame(disc.astype(np.uint8), 64, 64)[..., 0] > 0
    assert abs(int(square.any(axis=1).sum()) - int(square.any(axis=0).sum())) <= 1
