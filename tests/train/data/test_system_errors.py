"""A file that the system cannot read may be good: the command stops, and the next start goes on with it.

A verdict on it would be kept as long as its size and time stay the same, so that it would be left out for good.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import pathlib
import struct

import numpy as np
import pytest
from PIL import Image

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import read_image, read_mp4
from neodragon_jax.base.video_stream import Unusable, open_video
from support.video_folder import arguments, movie, report_of
from train import captioned_clips
from train.data import clip_writer
from train.data.clip_source import ClipSource
from train.data.inspection import LOG
from train.data.video_files import inspect

# Errors that occur where a file is opened, and where it is read.
OPENING = (errno.EMFILE, errno.ENOENT, errno.ESTALE, errno.ETIMEDOUT)
READING = (errno.EIO, errno.ENOTCONN)


class LostDisk(io.FileIO):
    """A file whose second part cannot be read."""

    number = errno.EIO

    def readinto(self, buffer) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 400 or size is None or size < 0:
            raise OSError(self.number, os.strerror(self.number))
        return super().read(min(size, 500))


class Disk:
    """Python's `open`, with one file that the system cannot read as long as `number` is an error's."""

    def __init__(self, monkeypatch, name: str) -> None:
        self.number: int | None = None
        real = builtins.open

        def opened(path, *given, **options):
            if self.number is None or isinstance(path, int) or pathlib.Path(path).name != name:
                return real(path, *given, **options)
            if self.number in OPENING:
                raise OSError(self.number, os.strerror(self.number), os.fspath(path))
            file = LostDisk(path)
            file.number = self.number
            return file

        monkeypatch.setattr(builtins, 'open', opened)


def make_files(folder: pathlib.Path, suffix: str) -> None:
    folder.mkdir()
    for name in 'acb':
        if suffix == '.mp4':
            movie(folder / f'{name}.mp4', size=(64, 128))
        else:
            pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f'{name}.png')
        (folder / f'{name}.txt').write_text(name)


@pytest.mark.parametrize('number', [*OPENING, *READING], ids=errno.errorcode.get)
@pytest.mark.parametrize('suffix', ['.mp4', '.png'])
@pytest.mark.parametrize('stage', ['inspection', 'cutting'])
def test_the_command_stops_and_loses_nothing(tmp_path, monkeypatch, capsys, stage, suffix, number):
    make_files(tmp_path / 'in', suffix)
    disk, read_clips = Disk(monkeypatch, f'b{suffix}'), clip_writer.read_clips
    frames = '9' if suffix == '.mp4' else '1'
    given = [*arguments(tmp_path / 'in', tmp_path / 'out'), '--workers', '1', '--frames', frames]

    def cut(*everything):
        disk.number = number
        return read_clips(*everything)

    if stage == 'inspection':
        disk.number = number
    else:
        monkeypatch.setattr(clip_writer, 'read_clips', cut)
    assert captioned_clips.main(given) == 3
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith('error: ') and f'b{suffix}: ' in message
    known = {json.loads(line)['file'] for line in (tmp_path / 'out' / LOG).read_text().splitlines()[1:]}
    assert known == {f'{name}{suffix}' for name in ('a' if stage == 'inspection' else 'abc')}, 'no verdict on the file'

    disk.number = None
    monkeypatch.setattr(clip_writer, 'read_clips', read_clips)
    assert captioned_clips.main(given) == 0
    source = ClipSource(tmp_path / 'out' / '64x128', verify=True)
    assert [source[index]['prompt'] for index in range(len(source))] == ['a', 'b', 'c']
    assert not any(row['reason'] for row in report_of(tmp_path / 'out').values())


def test_damage_is_still_a_verdict(tmp_path):
    make_files(tmp_path / 'in', '.mp4')
    content = (tmp_path / 'in' / 'b.mp4').read_bytes()
    (tmp_path / 'in' / 'b.mp4').write_bytes(content[: len(content) // 2])
    assert captioned_clips.main([*arguments(tmp_path / 'in', tmp_path / 'out'), '--frames', '9']) == 0
    assert 'damaged' in report_of(tmp_path / 'out')['b.mp4']['reason']


def test_a_caption_that_the_system_cannot_read_stops_the_command(tmp_path, monkeypatch, capsys):
    """Its clip would be removed from the set, which a training may read before the next start."""
    make_files(tmp_path / 'in', '.mp4')
    given = [*arguments(tmp_path / 'in', tmp_path / 'out'), '--frames', '9']
    assert captioned_clips.main(given) == 0
    real = pathlib.Path.read_bytes

    def fails(path: pathlib.Path) -> bytes:
        if path.name == 'b.txt':
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(pathlib.Path, 'read_bytes', fails)
    assert captioned_clips.main(given) == 3
    assert 'b.txt: the disk cannot be read' in capsys.readouterr().err
    assert len(ClipSource(tmp_path / 'out' / '64x128')) == 3


@pytest.mark.parametrize(('number', 'status'), [(errno.EIO, 3), (errno.EACCES, 0)])
def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch, number, status):
    """One without permission stays so, such as lost+found."""
    make_files(tmp_path / 'in', '.mp4')
    (tmp_path / 'in' / 'more').mkdir()
    real = os.scandir

    def fails(path):
        if os.fspath(path).endswith('more'):
            raise OSError(number, os.strerror(number), os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, 'scandir', fails)
    assert captioned_clips.main([*arguments(tmp_path / 'in', tmp_path / 'out'), '--frames', '9']) == status


@pytest.mark.parametrize('number', [*OPENING, *READING], ids=errno.errorcode.get)
def test_readers_tell_an_error_of_the_system_from_damage(tmp_path, monkeypatch, number):
    make_files(tmp_path / 'in', '.mp4')
    path, disk = tmp_path / 'in' / 'b.mp4', Disk(monkeypatch, 'b.mp4')
    disk.number = number
    with pytest.raises(OSError, match=str(path)) as error, open_video(path) as stream:
        list(stream.frames())
    assert error.value.errno == number
    with pytest.raises(InputError, match=rf'b\.mp4 cannot be read \({os.strerror(number)}\); correct the path'):
        read_mp4(path)


def test_damage_that_leads_to_a_place_without_bytes_is_no_error_of_the_system(tmp_path):
    """The system refuses places beyond those that any file can have."""
    path = tmp_path / 'a.png'
    path.write_bytes(b'II+\0' + struct.pack('<HHQ', 8, 0, 2**63 - 9) + bytes(64))
    with pytest.raises(InputError, match='not a picture, or damaged'):
        read_image(path)
    with pytest.raises(Unusable, match='not a picture, or damaged'):
        inspect(path)
