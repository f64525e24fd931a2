"""Outputs of the player are tried before any work, and a video whose file fails is not lost."""

import argparse
import errno
import os
import pathlib
import re
import tempfile

import av.codec
import av.error
import numpy as np
import pytest
from neodragon_phone import __main__ as command
from neodragon_phone.bundle import Bundle
from neodragon_phone.errors import BundleError
from neodragon_phone.frames import write_video
from neodragon_phone.output import written

OUTPUTS = ('--out', '--report')
FRAMES = np.arange(2 * 16 * 16 * 3, dtype=np.uint8).reshape(2, 16, 16, 3)


def refused(capsys, monkeypatch, *arguments):
    """Return the line of a command that is refused before it opens the bundle."""
    monkeypatch.setattr(Bundle, 'open', lambda *_: pytest.fail('the outputs are tried before'))
    assert command.main(['bundle', '--prompt', 'a cat', *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    return error


def test_these_are_the_outputs(monkeypatch):
    class Captured(BaseException):
        pass

    def capture(parser, argv):
        raise Captured(parser)

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', capture)
    with pytest.raises(Captured) as caught:
        command.parse_options([])
    paths = {(action.option_strings or [action.dest])[0] for action in caught.value.args[0]._actions
             if action.type is pathlib.Path}  # fmt: skip
    assert paths == {'bundle', '--image', *OUTPUTS}


@pytest.mark.parametrize('option', OUTPUTS)
def test_a_path_that_cannot_be_written_is_refused_before_any_work(option, tmp_path, capsys, monkeypatch):
    (tmp_path / 'file').write_text('')
    for path in (tmp_path, tmp_path / 'file' / 'x', tmp_path / 'file' / 'y' / 'x', tmp_path / ('x' * 300), 'a\0b'):
        line = refused(capsys, monkeypatch, '--out', tmp_path / 'video.mp4', option, path)
        assert f'{option} ' in line and 'cannot be written' in line and f'Give another {option}.' in line
    assert 'a part of the path is a file' in refused(capsys, monkeypatch, option, tmp_path / 'file' / 'x')
    assert [path.name for path in tmp_path.iterdir()] == ['file'] and not (tmp_path / 'file').read_bytes()


@pytest.mark.parametrize('option', OUTPUTS)
@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_full_or_protected_disk_is_refused_before_any_work(option, number, tmp_path, capsys, monkeypatch):
    write = pathlib.Path.write_bytes

    def fail(path, content):
        if str(path).startswith(str(tmp_path / 'new')):
            raise OSError(number, os.strerror(number), str(path))
        return write(path, content)

    monkeypatch.setattr(pathlib.Path, 'write_bytes', fail)
    line = refused(capsys, monkeypatch, '--out', tmp_path / 'video.mp4', option, tmp_path / 'new' / 'folder' / 'x')
    assert os.strerror(number) in line and f'Give another {option}.' in line
    assert not list(tmp_path.iterdir()), 'folders that the trial made are removed'


def test_a_report_in_place_of_the_video_is_refused(tmp_path, capsys, monkeypatch):
    path = tmp_path / 'video.mp4'
    assert 'the same file as --out' in refused(capsys, monkeypatch, '--out', path, '--report', path)


@pytest.mark.parametrize('option', OUTPUTS)
def test_an_input_in_place_of_an_output_is_refused(option, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = tmp_path / 'picture.png'
    picture.write_bytes(b'picture')
    assert f'{option} bundle/manifest.json: it is in the bundle' in refused(
        capsys, monkeypatch, '--out', 'video.mp4', option, 'bundle/manifest.json'
    )
    line = refused(capsys, monkeypatch, '--out', 'video.mp4', '--image', 'picture.png', option, picture)
    assert f'{option} {picture}: it is the picture of --image' in line
    assert [path.name for path in tmp_path.iterdir()] == ['picture.png'] and picture.read_bytes() == b'picture'


def test_a_missing_encoder_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    def unknown(*_):
        raise av.codec.codec.UnknownCodecError('libx264')

    monkeypatch.setattr('av.codec.Codec', unknown)
    assert 'no encoder libx264' in refused(capsys, monkeypatch, '--out', tmp_path / 'video.mp4')


@pytest.mark.parametrize('seed', [-1, 2**64])
def test_a_seed_out_of_range_is_refused_before_any_work(seed, capsys, monkeypatch):
    assert f'--seed {seed} is out of range' in refused(capsys, monkeypatch, '--seed', seed)


FAULTS = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ValueError('width not divisible by 2'),
    av.error.ExternalError(542398533, 'Generic error in an external library'),
]


@pytest.mark.parametrize('fault', FAULTS, ids=lambda fault: type(fault).__name__)
def test_the_frames_of_a_video_that_cannot_be_written_are_kept(fault, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
    (tmp_path / 'temporary').mkdir()
    monkeypatch.setattr('av.open', fail)
    with pytest.raises(BundleError) as caught:
        write_video(tmp_path / 'video.mp4', FRAMES, 24)
    message = str(caught.value)
    assert f'--out {tmp_path}/video.mp4: cannot be written' in message and '\n' not in message
    (kept,) = re.findall(r'are in (\S+):', message)
    np.testing.assert_array_equal(np.load(kept), FRAMES)
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'absent'))
    with pytest.raises(BundleError, match='frames are lost'):
        write_video(tmp_path / 'video.mp4', FRAMES, 24)


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / 'new' / 'report.json'
    with pytest.raises(KeyboardInterrupt), written(path, '--report') as draft:
        draft.write_text('{')
        raise KeyboardInterrupt
    assert not list(path.parent.iterdir())
    with written(path, '--report') as draft:
        draft.write_text('{}')
        assert not path.exists()
    assert [found.name for found in path.parent.iterdir()] == ['report.json']
