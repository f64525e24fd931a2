"""Folders of videos become clips: good files are cut by time, not by frame count; the others are reported."""

from __future__ import annotations

import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from support.video_folder import BAD, FRAMES, GOOD, arguments, make_folder, movie, number_of, report_of, with_table
from train import captioned_clips
from train.data import clip_writer, inspection, video_files
from train.data.clip_source import ClipSource


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


@pytest.mark.parametrize('out', ['in', 'in/clips', 'link/clips'])
def test_clips_are_not_written_among_the_videos(tmp_path, capsys, out):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'a.mp4').touch()
    (tmp_path / 'link').symlink_to(tmp_path / 'in')
    assert captioned_clips.main(arguments(tmp_path / 'in', tmp_path / out)) == 2
    assert 'lies in the folder of --videos; choose a folder outside of it' in capsys.readouterr().err
    assert [path.name for path in (tmp_path / 'in').iterdir()] == ['a.mp4']


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


@pytest.mark.parametrize('begun', [False, True])
def test_an_unchanged_file_that_cannot_be_cut_is_left_out(tmp_path, monkeypatch, begun):
    """One file must not stop the command at every start, whether its set is new or gets an addition."""
    (tmp_path / 'in').mkdir()
    for name in 'acb':
        if begun and name == 'b':
            assert captioned_clips.main(arguments(tmp_path / 'in', tmp_path / 'out')) == 0
        movie(tmp_path / 'in' / f'{name}.mp4', size=(64, 128))
        (tmp_path / 'in' / f'{name}.txt').write_text(name)
    read_clips = clip_writer.read_clips

    def fails(path, *more):
        if path.name == 'b.mp4':
            raise video_files.Unusable('color matrix unknown')
        return read_clips(path, *more)

    monkeypatch.setattr(clip_writer, 'read_clips', fails)
    for _ in range(2):
        assert captioned_clips.main(arguments(tmp_path / 'in', tmp_path / 'out')) == 0
        assert report_of(tmp_path / 'out')['b.mp4'] == {
            'file': 'b.mp4', 'clips': '0', 'size': '', 'reason': 'color matrix unknown'
        }  # fmt: skip
        source = ClipSource(tmp_path / 'out' / '64x128', verify=True)
        assert [source[index]['prompt'] for index in range(len(source))] == ['a', 'c']
        assert not list((tmp_path / 'out').glob('.*64*'))


def test_a_file_that_changes_meanwhile_is_an_error_with_its_remedy(tmp_path, monkeypatch, capsys):
    (tmp_path / 'in').mkdir()
    movie(tmp_path / 'in' / 'a.mp4', size=(64, 128))
    (tmp_path / 'in' / 'a.txt').write_text('a')

    def changed(path, *more):
        path.touch()
        raise video_files.Unusable('truncated')

    monkeypatch.setattr(clip_writer, 'read_clips', changed)
    assert captioned_clips.main(arguments(tmp_path / 'in', tmp_path / 'out')) == 2
    assert 'a.mp4 has changed since it was inspected: truncated. Run the same command again' in capsys.readouterr().err
    monkeypatch.undo()
    assert captioned_clips.main(arguments(tmp_path / 'in', tmp_path / 'out')) == 0


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
