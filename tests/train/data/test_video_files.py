"""Videos are read as a player shows them, or left out with a reason, for any names and timelines."""

from __future__ import annotations

import fractions
import math
import os
import pathlib
import struct

import av
import numpy as np
import pytest
from PIL import Image

from neodragon_jax.base import video_stream
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import read_mp4
from train.data.video_files import Unusable, inspect, read_clips

HEIGHT, WIDTH = 64, 96
COLORS = {'red': (200, 30, 30), 'green': (30, 180, 30), 'blue': (30, 30, 200), 'white': (230, 230, 230)}
UPRIGHT = ('red', 'green', 'blue', 'white')  # left to right, then the lower row
ROOT_2 = math.sqrt(0.5)


def quadrants(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    picture = np.zeros((height, width, 3), np.uint8)
    for name, (row, column) in zip(UPRIGHT, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        rows = slice(row * height // 2, (row + 1) * height // 2)
        picture[rows, column * width // 2 : (column + 1) * width // 2] = COLORS[name]
    return picture


def write(
    path: pathlib.Path, codec: str = 'libx264', pix_fmt: str = 'yuv420p', frames: int = 24, **tags
) -> pathlib.Path:
    """Write a video of the four quadrants; tags are of the codec context."""
    size = tags.pop('size', (HEIGHT, WIDTH))
    sound_s, options = tags.pop('sound_s', 0.0), tags.pop('options', {'crf': '4'})
    with av.open(f'file:{path}', 'w') as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        sound = (
            container.add_stream('libopus' if path.suffix in ('.mkv', '.webm') else 'aac', rate=48000)
            if sound_s
            else None
        )
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(quadrants(*size), format='rgb24').reformat(format=pix_fmt)
            frame.pts, frame.time_base = number, fractions.Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            for start in range(0, int(sound_s * 48000), 960):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.int16), format='s16', layout='stereo')
                silence.sample_rate, silence.pts = 48000, start
                container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return path


def colors_of(path: pathlib.Path, size: tuple[int, int] = (64, 64)) -> tuple[str, ...]:
    """Return the nearest colors of the quadrants of a file's first frame."""
    (clip,) = read_clips(path, [[0]], size)
    shown = [clip[0, row * size[0] // 4, column * size[1] // 4] for row in (1, 3) for column in (1, 3)]
    distance = lambda pixel, name: np.abs(pixel.astype(int) - COLORS[name]).max()
    nearest = [min(COLORS, key=lambda name, pixel=pixel: distance(pixel, name)) for pixel in shown]
    assert max(distance(pixel, name) for pixel, name in zip(shown, nearest, strict=True)) < 12
    return tuple(nearest)


def with_matrix(path: pathlib.Path, source: pathlib.Path, *abcd: float) -> pathlib.Path:
    """Copy an mp4 with another display matrix."""
    content = bytearray(source.read_bytes())
    place = content.find(b'tkhd') + 4 + 4 + (32 if content[content.find(b'tkhd') + 4] == 1 else 20) + 16
    a, b, c, d = (round(value * 65536) for value in abcd)
    content[place : place + 36] = struct.pack('>9i', a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


@pytest.fixture(scope='module')
def plain(tmp_path_factory) -> pathlib.Path:
    return write(tmp_path_factory.mktemp('videos') / 'plain.mp4')


@pytest.mark.parametrize(
    ('matrix', 'want'),
    [
        ((1, 0, 0, 1), ('red', 'green', 'blue', 'white')),
        ((0, 1, -1, 0), ('blue', 'red', 'white', 'green')),  # clockwise
        ((-1, 0, 0, -1), ('white', 'blue', 'green', 'red')),
        ((0, -1, 1, 0), ('green', 'white', 'red', 'blue')),  # counterclockwise
        ((-1, 0, 0, 1), ('green', 'red', 'white', 'blue')),  # mirrored
        ((1, 0, 0, -1), ('blue', 'white', 'red', 'green')),  # upside down
        ((0, 1, 1, 0), ('red', 'blue', 'green', 'white')),  # transposed
        ((0, -1, -1, 0), ('white', 'green', 'blue', 'red')),
        ((2, 0, 0, 2), ('red', 'green', 'blue', 'white')),
    ],
)
def test_turned_and_mirrored_videos_are_shown_upright(tmp_path, plain, matrix, want):
    path = with_matrix(tmp_path / 'a.mp4', plain, *matrix)
    assert colors_of(path) == want
    footage = inspect(path)
    assert (footage.height, footage.width) == ((WIDTH, HEIGHT) if matrix[0] == 0 else (HEIGHT, WIDTH))


@pytest.mark.parametrize('matrix', [(ROOT_2, ROOT_2, -ROOT_2, ROOT_2), (1, 0.5, 0, 1), (2, 0, 0, 1), (0, 0, 0, 0)])
def test_skewed_videos_are_left_out(tmp_path, plain, matrix):
    with pytest.raises(Unusable, match='shown askew by its display matrix'):
        inspect(with_matrix(tmp_path / 'a.mp4', plain, *matrix))


@pytest.mark.parametrize(
    ('tags', 'reason'),
    [
        ({'color_trc': 18, 'color_primaries': 9, 'colorspace': 9}, r'HDR \(HLG\); tone-map it'),
        ({'color_trc': 16, 'color_primaries': 9, 'colorspace': 9}, r'HDR \(PQ\); tone-map it'),
        ({'color_primaries': 9}, r'wide colors \(BT\.2020\)'),
        ({'options': {'crf': '4', 'x264-params': 'tff=1'}}, 'interlaced; deinterlace it first'),
        ({'codec': 'ffv1', 'pix_fmt': 'yuva420p', 'options': {}}, 'has transparency'),
        ({'codec': 'prores_ks', 'pix_fmt': 'yuva444p10le', 'options': {}}, 'has transparency'),
    ],
)
def test_what_cannot_be_shown_right_is_left_out_with_the_reason(tmp_path, tags, reason):
    with pytest.raises(Unusable, match=reason):
        inspect(write(tmp_path / 'a.mkv', **tags))


def mirrored(folder: pathlib.Path, plain: pathlib.Path) -> pathlib.Path:
    return with_matrix(folder / 'mirrored.mp4', plain, -1, 0, 0, 1)


def with_aperture(folder: pathlib.Path, plain: pathlib.Path, width: int, height: int) -> pathlib.Path:
    """Copy an mp4 with a clean aperture at the end of its sample entry."""
    content, box = bytearray(plain.read_bytes()), struct.pack('>I4s8i', 40, b'clap', width, 1, height, 1, 0, 1, 0, 1)
    boxes = [content.rfind(name) - 4 for name in (b'moov', b'trak', b'mdia', b'minf', b'stbl', b'stsd', b'avc1')]
    end = boxes[-1] + int.from_bytes(content[boxes[-1] : boxes[-1] + 4])
    for place in boxes:
        content[place : place + 4] = (int.from_bytes(content[place : place + 4]) + len(box)).to_bytes(4)
    content[end:end] = box
    (folder / 'aperture.mp4').write_bytes(content)
    return folder / 'aperture.mp4'


def with_pixel_crop(folder: pathlib.Path, left: int) -> pathlib.Path:
    """Write a Matroska file that crops its left border: the element takes the place of DisplayUnit."""
    content = write(folder / 'a.mkv').read_bytes()
    assert content.count(b'\x54\xb2\x81\x04') == 1
    (folder / 'crop.mkv').write_bytes(content.replace(b'\x54\xb2\x81\x04', b'\x54\xcc\x81' + bytes([left])))
    return folder / 'crop.mkv'


def two_tracks(folder: pathlib.Path, plain: pathlib.Path) -> pathlib.Path:
    """Write a file whose second track, of the four quadrants, is the default one."""
    del plain
    with av.open(str(folder / 'two.mkv'), 'w') as container:
        pictures = (255 - quadrants(), quadrants())
        streams = [container.add_stream('libx264', rate=24, options={'crf': '4'}) for _ in pictures]
        for stream, flag in zip(streams, (0, av.stream.Disposition.default), strict=True):
            stream.height, stream.width, stream.pix_fmt, stream.disposition = HEIGHT, WIDTH, 'yuv420p', flag
        for _ in range(24):
            for stream, picture in zip(streams, pictures, strict=True):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format='rgb24')))
        for stream in streams:
            container.mux(stream.encode())
    return folder / 'two.mkv'


def tagged(**tags: int):
    """Return a maker of a video with color tags of ITU-T H.273."""
    return lambda folder, plain: write(folder / 'a.mkv', **tags)


HDR = {'color_primaries': 9, 'colorspace': 9}
# What a reader must not ignore -> the file, and its quadrants, or the reason for leaving it out.
METADATA = {
    'HLG': (lambda folder, plain: write(folder / 'a.mkv', color_trc=18, **HDR), 'HDR'),
    'PQ': (lambda folder, plain: write(folder / 'a.mkv', color_trc=16, **HDR), 'HDR'),
    'mirrored': (mirrored, ('green', 'red', 'white', 'blue')),
    'interlaced': (
        lambda folder, plain: write(folder / 'a.mkv', options={'crf': '4', 'x264-params': 'tff=1'}),
        'interlaced',
    ),
    'alpha': (
        lambda folder, plain: write(folder / 'a.mkv', codec='ffv1', pix_fmt='yuva420p', options={}),
        'has transparency',
    ),
    'Display P3': (tagged(color_primaries=12), r'wide colors \(Display P3\); convert it'),
    'DCI-P3': (tagged(color_primaries=11), r'wide colors \(DCI-P3\)'),
    'XYZ': (tagged(color_primaries=10), r'wide colors \(CIE XYZ\)'),
    'film': (tagged(color_primaries=8), r'wide colors \(film\)'),
    'BT.2020 by its matrix': (tagged(colorspace=9), r'wide colors \(BT\.2020\)'),
    'gamma 2.8': (tagged(color_trc=5), 'transfer curve gamma 2.8; convert it'),
    'linear': (tagged(color_trc=8), 'transfer curve linear'),
    'logarithmic': (tagged(color_trc=9), 'transfer curve logarithmic 100:1'),
    'SMPTE 428': (tagged(color_trc=17), 'transfer curve SMPTE 428'),
    'YCgCo': (tagged(colorspace=8), 'color matrix YCgCo; convert it'),
    'constant luminance': (tagged(colorspace=10, color_primaries=1), 'color matrix BT.2020 with constant luminance'),
    'SMPTE 2085': (tagged(colorspace=11), 'color matrix SMPTE 2085'),
    'derived': (tagged(colorspace=12), 'color matrix derived'),
    'ICtCp': (tagged(colorspace=14), 'color matrix ICtCp'),
    'clap': (lambda folder, plain: with_aperture(folder, plain, WIDTH // 2, HEIGHT), 'cropped by its container'),
    'whole clap': (lambda folder, plain: with_aperture(folder, plain, WIDTH, HEIGHT), UPRIGHT),
    'PixelCrop': (lambda folder, plain: with_pixel_crop(folder, 32), 'cropped by its container'),
    'no PixelCrop': (lambda folder, plain: with_pixel_crop(folder, 0), UPRIGHT),
    'default track': (two_tracks, UPRIGHT),
}


@pytest.mark.parametrize('kind', METADATA)
def test_every_reader_of_videos_shows_or_leaves_out(tmp_path, plain, kind):
    """Training clips, and read_mp4 of metrics, crops and samples. Pictures: tests/neodragon_jax/base/test_video.py."""
    make, want = METADATA[kind]
    path = make(tmp_path, plain)
    if isinstance(want, str):
        for read, error in ((inspect, Unusable), (read_mp4, InputError)):
            with pytest.raises(error, match=want):
                read(path)
        return
    assert colors_of(path) == want
    shown = [read_mp4(path)[0][row * HEIGHT // 4, column * WIDTH // 4] for row in (1, 3) for column in (1, 3)]
    assert all(np.abs(pixel.astype(int) - COLORS[name]).max() < 12 for pixel, name in zip(shown, want, strict=True))


def test_ordinary_color_tags_are_converted(tmp_path):
    assert colors_of(write(tmp_path / 'rgb.mkv', codec='ffv1', pix_fmt='bgr0', options={})) == UPRIGHT
    assert colors_of(write(tmp_path / 'gbr.mkv', codec='libx264rgb', pix_fmt='rgb24')) == UPRIGHT
    assert colors_of(write(tmp_path / 'full.mkv', pix_fmt='yuvj420p')) == UPRIGHT


@pytest.mark.parametrize('tags', [{'color_primaries': 5}, {'color_primaries': 6, 'color_trc': 6}, {'color_trc': 13},
                                  {'colorspace': 3}, {'color_primaries': 1, 'color_trc': 15}])  # fmt: skip
def test_tags_near_srgb_are_read(tmp_path, tags):
    assert colors_of(write(tmp_path / 'a.mkv', **tags)) == UPRIGHT


def test_untagged_video_is_converted_as_players_do(tmp_path):
    """BT.709 from 720 lines on, BT.601 below."""
    for size, matrix in (((720, 960), 'ITU709'), ((480, 640), 'ITU601')):
        path = tmp_path / f'{matrix}.mkv'
        with av.open(str(path), 'w') as container:
            stream = container.add_stream('libx264', rate=24, options={'crf': '1'})
            stream.height, stream.width, stream.pix_fmt = *size, 'yuv420p'
            frame = av.VideoFrame.from_ndarray(quadrants(*size), format='rgb24')
            container.mux(stream.encode(frame.reformat(format='yuv420p', dst_colorspace=matrix)))
            container.mux(stream.encode())
        (clip,) = read_clips(path, [[0]], (64, 64))
        assert np.abs(clip[0, 16, 16].astype(int) - COLORS['red']).max() < 6


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv', '.webm', '.ts', '.avi', '.mov'])
@pytest.mark.parametrize('sound_s', [0.0, 3.0])
def test_a_track_is_complete_by_its_own_timeline(tmp_path, suffix, sound_s):
    codec = {'.webm': 'libvpx-vp9', '.avi': 'mpeg4'}.get(suffix, 'libx264')
    footage = inspect(write(tmp_path / f'a{suffix}', codec=codec, sound_s=sound_s, options={}))
    assert len(footage.times) == 24
    assert footage.times[-1] - footage.times[0] == pytest.approx(23 / 24, abs=0.05)


def copied(path: pathlib.Path, source: pathlib.Path, start_s: float, packets: int = 10**6) -> pathlib.Path:
    """Copy packets from the key frame before a time on, the earlier frames hidden, as `ffmpeg -ss -c copy` does."""
    with av.open(str(source)) as given, av.open(str(path), 'w') as container:
        track = given.streams.video[0]
        stream = container.add_stream_from_template(track)
        given.seek(round(start_s * av.time_base))
        for packet in list(given.demux(track))[:packets]:
            if packet.dts is not None and packet.pts is not None:
                packet.stream = stream
                shift = round(start_s / packet.time_base)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                container.mux(packet)
    return path


def test_frames_that_an_edit_list_hides_are_not_missing(tmp_path):
    source = write(tmp_path / 'a.mp4', frames=60, options={'crf': '4', 'g': '12', 'bf': '3'})
    for suffix in ('.mp4', '.mkv'):
        path = copied(tmp_path / f'cut{suffix}', source, 0.7)
        footage = inspect(path)
        assert 40 <= len(footage.times) <= 50


def test_truncated_files_are_left_out(tmp_path):
    for suffix, sound_s in (('.mkv', 0.0), ('.mkv', 3.0), ('.webm', 3.0)):
        codec = 'libvpx-vp9' if suffix == '.webm' else 'libx264'
        path = write(tmp_path / f'a{suffix}', codec=codec, sound_s=sound_s, frames=72, options={'g': '12'})
        content = path.read_bytes()
        for share in (0.3, 0.6):
            path.write_bytes(content[: int(len(content) * share)])
            with pytest.raises(Unusable, match=r'truncated|damaged|no frames|no video'):
                inspect(path)


def test_a_cover_picture_is_not_the_video(tmp_path):
    path, cover = tmp_path / 'a.mp4', tmp_path / 'cover.png'
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(cover)
    with av.open(str(cover)) as given, av.open(str(path), 'w') as container:
        picture = container.add_stream_from_template(given.streams.video[0])
        picture.disposition = av.stream.Disposition.attached_pic
        stream = container.add_stream('libx264', rate=24)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, 'yuv420p'
        for packet in given.demux():
            if packet.dts is not None and packet.pts is not None:
                packet.stream = picture
                container.mux(packet)
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(quadrants(), format='rgb24')))
        container.mux(stream.encode())
    footage = inspect(path)
    assert (len(footage.times), footage.height, footage.width) == (12, HEIGHT, WIDTH)


NAMES = [
    '2024-05-01T12:30:00.mp4', 'clip%03d.mp4', '日本.mp4', 'a#b?c.mp4', 'quote\'"x.mp4', 'new\nline.mp4', 'UPPER.MP4',
    'data:x.mp4', 'file:y.mp4', 'concat:a|b.mp4', '-dash.mp4', 'http:x.mp4', os.fsdecode(b'latin\xe9.mp4'),
]  # fmt: skip


@pytest.mark.parametrize('name', NAMES)
def test_a_name_is_a_name_and_no_protocol(tmp_path, plain, monkeypatch, name):
    (tmp_path / name).write_bytes(plain.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(inspect(pathlib.Path(name)).times) == 24
    assert len(inspect(tmp_path / name).times) == 24


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
    path = write(tmp_path / 'a.mp4', frames=2)
    monkeypatch.setattr(video_stream, 'MOST_PIXELS', HEIGHT * WIDTH - 1)
    monkeypatch.setattr(video_stream.VideoStream, 'frames', None)
    with pytest.raises(Unusable, match='96x64 pixels, more than 6143'):
        inspect(path)


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv', '.avi'])
def test_text_in_a_file_may_be_in_any_encoding(tmp_path, suffix):
    """Cameras and editors write titles and the names of their encoders in the encoding of their system."""
    path = tmp_path / f'a{suffix}'
    with av.open(str(path), 'w') as container:
        container.metadata['title'] = 'a title in CAFE'
        stream = container.add_stream('mpeg4', rate=24)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, 'yuv420p'
        stream.metadata['handler_name'] = stream.metadata['title'] = 'a track in CAFE'
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(quadrants(), format='rgb24')))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert content.count(b'CAFE') >= 2
    path.write_bytes(content.replace(b'CAFE', b'C\xe9\x85\xff'))
    with pytest.raises(UnicodeDecodeError), av.open(str(path)):
        pass
    assert len(inspect(path).times) == 12
