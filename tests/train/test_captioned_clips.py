"""Folders of videos become clips: good files are cut by time, not by frame count; the others are reported."""

from __future__ import annotations

import csv
import fractions
import json
import pathlib
import re
import unicodedata

import av
import numpy as np
import pytest
from PIL import Image

from neodragon_jax.base.errors import InputError
from train import captioned_clips
from train.data import clip_writer, inspection, mp4_bytes, video_files
from train.data.clip_source import ClipSource
from train.data.video_files import Footage, Unusable, choose_size, cut, ticks

FRAMES = 9
CLOCK = fractions.Fraction(1, 600)  # seconds
BARS = 8


def numbered(index: int, size: tuple[int, int]) -> np.ndarray:
    """Return a picture of vertical bars that encode a number below 256 in binary."""
    bits = index >> np.arange(BARS) & 1
    row = np.repeat(np.where(bits, 200, 50), -(-size[1] // BARS))[: size[1]]
    return np.broadcast_to(row[None, :, None], (*size, 3)).astype(np.uint8)


def number_of(frame: np.ndarray) -> int:
    """Return what `numbered` says after compression and resizing, if no column is cut off."""
    bars = frame.mean(axis=(0, 2)).reshape(BARS, -1).mean(axis=1)
    return int((bars > 125) @ (1 << np.arange(BARS)))


def movie(path: pathlib.Path, times=None, size=(128, 160), codec='libx264', picture=None, **options) -> pathlib.Path:
    """Write a video whose frames show their numbers, or all one picture."""
    times = np.arange(30) / 24 if times is None else times
    with av.open(str(path), 'w', options={'movflags': '+faststart'} if path.suffix == '.mp4' else {}) as container:
        stream = container.add_stream(codec, rate=24, options={'crf': '8', 'g': '12'} if codec == 'libx264' else {})
        stream.height, stream.width, stream.pix_fmt = *size, 'yuv420p'
        stream.codec_context.time_base = CLOCK
        for name, value in options.items():
            setattr(stream.codec_context, name, value)
        for number, time_s in enumerate(times):
            pixels = numbered(number, size) if picture is None else picture
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format='rgb24')
            frame.pts, frame.time_base = round(time_s / CLOCK), CLOCK
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def textured(path: pathlib.Path) -> pathlib.Path:
    """Write a video with enough bytes per frame to damage."""
    noise = np.random.default_rng(0).integers(0, 255, (128, 160, 3), np.uint8)
    return movie(path, picture=noise)


def audio_only(path: pathlib.Path) -> None:
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('aac', rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def turned(path: pathlib.Path, source: pathlib.Path) -> None:
    """Copy an mp4, marked as held upright: to be turned clockwise when shown."""
    words = lambda *values: b''.join((value % 2**32).to_bytes(4, 'big') for value in values)
    one, last = 1 << 16, 1 << 30
    content = source.read_bytes()
    place = content.index(words(one, 0, 0, 0, one, 0, 0, 0, last), content.index(b'tkhd'))
    matrix = words(0, one, 0, -one, 0, 0, 0, 0, last)
    path.write_bytes(content[:place] + matrix + content[place + len(matrix) :])


GOOD = {
    'wide.mp4': 'a dragon née №1 🐉, \u2068שלום\u2069',
    'tall.mp4': 'second line',
    'de\u0301ja\u0300 vu.mkv': 'decomposed name',  # the table names it in composed form
    'sub/deep.webm': 'of another codec',
    'variable.mov': 'uneven times',
}
BAD = {
    'truncated.mp4': r'damaged, or not a video',
    'cut_between_frames.mp4': r'truncated: declares 30 frames, holds 20',
    'cut.mkv': r'truncated: declares 1.2 s, holds 0.\d s',
    'no_index.mp4': r'no video in it',
    'flipped.mp4': r'damaged, or not a video',
    'zero.mp4': r'empty file',
    'codec.mp4': r'its codec is unknown here',
    'sound.mp4': r'no video in it',
    'short.mp4': r'too short: 5 frames at 24 per second, 9 needed',
    'slow.mp4': r'12 frames per second, fewer than 23',
    'frozen.mp4': r'no frame from 0.46 s to 0.75 s',
    'small.mp4': r'48x64 pixels, smaller than 64x128 and 128x64',
    'text.mp4': r'damaged, or not a video',
    'still.png': r'a single picture; clips have 9 frames',
    'renamed.mp4': r'a single picture; clips have 9 frames',
    'notes.pdf': r'neither video nor picture by its name \(\.pdf\)',
    'uncaptioned.mp4': r'no caption',
    'empty_caption.mp4': r'caption is empty',
    'latin1.mp4': r'caption is not valid Unicode',
    'lost.mp4': r'caption has lost characters',
    'absent.mp4': r'has a caption, but is not there',
}


def make_folder(folder: pathlib.Path) -> None:
    """Write the files of GOOD and BAD, and captions.csv."""
    (folder / 'sub').mkdir(parents=True)
    movie(folder / 'wide.mp4')
    movie(folder / 'tall.mp4', size=(160, 96))
    movie(folder / 'de\u0301ja\u0300 vu.mkv')
    movie(folder / 'sub' / 'deep.webm', codec='libvpx-vp9')
    rng = np.random.default_rng(0)
    movie(folder / 'variable.mov', np.cumsum(rng.integers(9, 30, 50)) / 600)
    content = textured(folder / 'whole.mp4').read_bytes()
    (folder / 'truncated.mp4').write_bytes(content[: len(content) * 2 // 3])
    with av.open(str(folder / 'whole.mp4')) as container:
        packets = list(container.demux(video=0))
    (folder / 'cut_between_frames.mp4').write_bytes(content[: packets[20].pos])
    (folder / 'flipped.mp4').write_bytes(content[:50_000] + bytes(2000) + content[52_000:])
    (folder / 'codec.mp4').write_bytes(content.replace(b'avc1', b'zzzz'))
    whole = (folder / 'whole.mp4').rename(folder / 'uncaptioned.mp4')
    # Without its index at the front, an mp4 is lost.
    moved = content.index(b'mdat') - 4
    (folder / 'no_index.mp4').write_bytes(content[:40] + content[moved:])
    matroska = textured(folder / 'cut.mkv')
    matroska.write_bytes(matroska.read_bytes()[: matroska.stat().st_size // 2])
    (folder / 'zero.mp4').touch()
    audio_only(folder / 'sound.mp4')
    movie(folder / 'short.mp4', np.arange(5) / 24)
    movie(folder / 'slow.mp4', np.arange(20) / 12)
    movie(folder / 'frozen.mp4', np.delete(np.arange(40) / 24, slice(12, 18)))
    movie(folder / 'small.mp4', size=(48, 64))
    (folder / 'text.mp4').write_text('not a video\n' * 100)
    Image.new('RGB', (200, 200)).save(folder / 'still.png')
    (folder / 'renamed.mp4').write_bytes((folder / 'still.png').read_bytes())
    (folder / 'notes.pdf').write_bytes(b'%PDF')
    for name in ('empty_caption', 'latin1', 'lost'):
        (folder / f'{name}.mp4').write_bytes(whole.read_bytes())
    captions = {unicodedata.normalize('NFC', name): text for name, text in GOOD.items()}
    captions['tall.mp4'] = 'second\r\n\tline\0'
    captions |= {name: 'any' for name in BAD if name not in ('uncaptioned.mp4',)}
    captions |= {'empty_caption.mp4': ' \ufeff\u200b\n', 'lost.mp4': 'caf\ufffd'}
    with (folder / 'captions.csv').open('w', encoding='utf-8-sig', newline='') as file:
        table = csv.writer(file)
        table.writerow(['file', 'caption'])
        table.writerows(captions.items())
    table = (folder / 'captions.csv').read_bytes()
    (folder / 'captions.csv').write_bytes(table.replace(b'latin1.mp4,any', b'latin1.mp4,caf\xe9'))


def arguments(folder, out, *more: str) -> list[str]:
    given = ['--videos', str(folder), '--out', str(out), '--frames', str(FRAMES), '--sizes', '64x128', '128x64']
    return [*given, '--workers', '2', '--samples-per-shard', '2', *more]


def with_table(folder, out) -> list[str]:
    return arguments(folder, out, '--captions', str(folder / 'captions.csv'))


def report_of(out: pathlib.Path) -> dict[str, dict[str, str]]:
    with (out / 'report.tsv').open(encoding='utf-8', newline='') as file:
        return {row['file']: row for row in csv.DictReader(file, delimiter='\t')}


@pytest.fixture(scope='module')
def videos(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp('videos') / 'in'
    make_folder(folder)
    return folder


@pytest.fixture(scope='module')
def clips(videos) -> pathlib.Path:
    out = videos.parent / 'clips'
    assert captioned_clips.main(with_table(videos, out)) == 0
    return out


def test_good_files_come_through_and_bad_ones_are_named(clips):
    report = report_of(clips)
    assert report.keys() == GOOD.keys() | BAD.keys()
    for name in GOOD:
        assert (report[name]['reason'], report[name]['clips']) == ('', '1'), report[name]
    for name, reason in BAD.items():
        assert report[name]['clips'] == '0'
        assert re.match(reason, report[name]['reason']), report[name]
    stored = {}
    for size in ('64x128', '128x64'):
        source = ClipSource(clips / size, verify=True)
        for index in range(len(source)):
            sample = source[index]
            stored[sample['file']] = sample['prompt']
            height, width = map(int, size.split('x'))
            assert (sample['video'].shape, sample['video'].dtype) == ((FRAMES, height, width, 3), np.uint8)
    assert stored == GOOD
    assert {sample['file'] for sample in map(ClipSource(clips / '128x64').__getitem__, range(1))} == {'tall.mp4'}


@pytest.mark.parametrize('name', ['wide.mp4', 'variable.mov', 'sub/deep.webm'])
def test_frames_are_those_nearest_in_time(clips, videos, name):
    source = ClipSource(clips / '64x128')
    sample = next(sample for sample in map(source.__getitem__, range(len(source))) if sample['file'] == name)
    times = video_files.inspect(videos / name).times
    moments = times[0] + np.arange(FRAMES * 20) / 24
    nearest = np.abs(times - moments[:, None]).argmin(axis=1)
    shown = np.array([number_of(frame) for frame in sample['video']])
    assert times[shown[0]] == pytest.approx(sample['start'])
    begin = int(np.flatnonzero(nearest == shown[0])[0])
    np.testing.assert_array_equal(shown, nearest[begin : begin + FRAMES])
    if name != 'variable.mov':
        np.testing.assert_array_equal(np.diff(shown), 1)


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


def test_interrupted_runs_go_on(clips, videos, tmp_path, monkeypatch):
    out, inspected, read = tmp_path / 'clips', [], []

    def interrupted(function, calls, limit):
        def call(*args):
            calls.append(args)
            if len(calls) == limit:
                raise KeyboardInterrupt
            return function(*args)

        return call

    inspect, read_clips = inspection.inspect, clip_writer.read_clips
    monkeypatch.setattr(inspection, 'inspect', interrupted(inspect, inspected, 12))
    assert captioned_clips.main([*with_table(videos, out), '--workers', '1']) == 130
    with (out / 'inspection.jsonl').open('a') as file:
        file.write('{"bytes": 1, "fi')  # as a kill leaves it
    monkeypatch.setattr(inspection, 'inspect', interrupted(inspect, inspected, 0))
    monkeypatch.setattr(clip_writer, 'read_clips', interrupted(read_clips, read, 3))
    assert captioned_clips.main([*with_table(videos, out), '--workers', '1']) == 130
    monkeypatch.setattr(clip_writer, 'read_clips', interrupted(read_clips, read, 0))
    assert captioned_clips.main([*with_table(videos, out), '--workers', '1']) == 0
    captioned = len(GOOD) + len(BAD) - 4 - 1  # three bad captions, one none, one without a file
    assert captioned <= len(inspected) <= captioned + 3  # the threads were ahead when they were interrupted
    assert len(read) <= len(GOOD) + 3
    for size in ('64x128', '128x64'):
        got, want = (json.loads((folder / size / 'manifest.json').read_text()) for folder in (out, clips))
        assert got == want
    # With other settings the files are inspected again.
    inspected.clear()
    assert captioned_clips.main([*with_table(videos, out), '--clips-per-video', '2']) == 2
    assert len(inspected) == captioned


def test_pictures_make_clips_of_one_frame(tmp_path, capsys):
    (tmp_path / 'in').mkdir()
    Image.new('RGB', (130, 70), (200, 30, 30)).save(tmp_path / 'in' / 'red.jpg')
    (tmp_path / 'in' / 'red.txt').write_text('a red wall\n')
    movie(tmp_path / 'in' / 'film.mp4')
    (tmp_path / 'in' / 'film.mp4.txt').write_text('gray')
    given = [*arguments(tmp_path / 'in', tmp_path / 'out'), '--frames', '1']
    assert captioned_clips.main(given) == 0
    source = ClipSource(tmp_path / 'out' / '64x128')
    assert [source[index]['prompt'] for index in range(2)] == ['gray', 'a red wall']
    assert source[1]['video'].shape == (1, 64, 128, 3)
    assert np.abs(source[1]['video'].astype(int) - [200, 30, 30]).max() < 12
    assert not (tmp_path / 'out' / '128x64').exists()
    assert '64x128: 2 clips' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--sizes', '320'], '--sizes 320: not a size'),
        (['--sizes', '100x128'], 'height 100 is not a positive multiple of 64; use 128'),
        (['--frames', '10'], '10 frames; use 8 n + 1'),
        (['--quality', '52'], '--quality is 52'),
        (['--workers', '0'], '--workers is 0'),
        (['--videos', 'nowhere'], 'nowhere: no such folder'),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, more, message):
    (tmp_path / 'in').mkdir()
    assert captioned_clips.main([*arguments(tmp_path / 'in', tmp_path / 'out'), *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1


def test_a_folder_without_a_usable_file_is_an_error(tmp_path, capsys):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'a.mp4').touch()
    (tmp_path / 'in' / 'a.txt').write_text('empty')
    assert captioned_clips.main(arguments(tmp_path / 'in', tmp_path / 'out')) == 2
    output = capsys.readouterr()
    assert 'no file is usable' in output.err
    assert 'a.mp4  empty file' in output.out


def test_an_added_video_and_a_changed_caption_cost_only_what_is_new(tmp_path, monkeypatch):
    def start(folder: pathlib.Path, names: str) -> None:
        folder.mkdir()
        for number, name in enumerate(names):
            add(folder, name, number)

    def add(folder: pathlib.Path, name: str, number: int) -> None:
        movie(folder / f'{name}.mp4', np.arange(20 + number) / 24, size=(64, 128))
        (folder / f'{name}.txt').write_text(f'caption {name}')

    start(tmp_path / 'in', 'ac')
    out, inspected, read = tmp_path / 'out', [], []
    assert captioned_clips.main(arguments(tmp_path / 'in', out)) == 0
    inspect, read_clips = inspection.inspect, clip_writer.read_clips
    monkeypatch.setattr(inspection, 'inspect', lambda path: inspected.append(path.name) or inspect(path))
    monkeypatch.setattr(
        clip_writer, 'read_clips', lambda path, *more: read.append(path.name) or read_clips(path, *more)
    )
    add(tmp_path / 'in', 'b', 2)
    (tmp_path / 'in' / 'a.txt').write_text('another caption')
    assert captioned_clips.main(arguments(tmp_path / 'in', out)) == 0
    assert (inspected, read) == (['b.mp4'], ['b.mp4'])
    source = ClipSource(out / '64x128', verify=True)
    assert [source[index]['prompt'] for index in range(3)] == ['another caption', 'caption b', 'caption c']
    assert captioned_clips.main(arguments(tmp_path / 'in', tmp_path / 'fresh')) == 0
    for name in ('manifest.json', 'origins.jsonl'):
        assert (out / '64x128' / name).read_bytes() == (tmp_path / 'fresh' / '64x128' / name).read_bytes()
    (tmp_path / 'in' / 'a.mp4').unlink()
    assert captioned_clips.main(arguments(tmp_path / 'in', out)) == 0
    assert len(ClipSource(out / '64x128')) == 2
    assert sorted(path.name for path in out.iterdir()) == ['64x128', 'inspection.jsonl', 'report.tsv']


@pytest.mark.parametrize('renamed', [False, True])
def test_a_kill_while_a_set_is_replaced_loses_nothing(tmp_path, monkeypatch, renamed):
    (tmp_path / 'in').mkdir()
    for name in 'ab':
        movie(tmp_path / 'in' / f'{name}.mp4', size=(64, 128))
        (tmp_path / 'in' / f'{name}.txt').write_text(name)
        if name == 'a':
            assert captioned_clips.main(arguments(tmp_path / 'in', tmp_path / 'out')) == 0
    real = clip_writer.os.rename

    def dies(source, target) -> None:
        if renamed and source.name == '64x128':
            real(source, target)
        raise SystemExit('killed')

    monkeypatch.setattr(clip_writer.os, 'rename', dies)
    with pytest.raises(SystemExit):
        captioned_clips.main(arguments(tmp_path / 'in', tmp_path / 'out'))
    monkeypatch.undo()
    monkeypatch.setattr(clip_writer, 'read_clips', None)  # nothing is decoded again
    assert captioned_clips.main(arguments(tmp_path / 'in', tmp_path / 'out')) == 0
    assert len(ClipSource(tmp_path / 'out' / '64x128', verify=True)) == 2
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['64x128', 'inspection.jsonl', 'report.tsv']


def test_linked_folders_are_searched_once(tmp_path):
    (tmp_path / 'disk' / 'part').mkdir(parents=True)
    (tmp_path / 'in').mkdir()
    for path in (tmp_path / 'disk' / 'part' / 'a.mp4', tmp_path / 'in' / 'c.mp4'):
        path.touch()
    (tmp_path / 'in' / 'part').symlink_to(tmp_path / 'disk' / 'part')
    (tmp_path / 'in' / 'circle').symlink_to(tmp_path / 'in')
    (tmp_path / 'disk' / 'part' / 'up').symlink_to(tmp_path / 'disk')
    assert captioned_clips.find_files(tmp_path / 'in', []) == ['c.mp4', 'part/a.mp4']
