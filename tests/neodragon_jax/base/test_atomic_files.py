"""Tests of files and folders that appear under their final name only when complete."""

from __future__ import annotations

import os
import pathlib

import pytest

from neodragon_jax.base import atomic
from neodragon_jax.base.atomic import atomic_file, atomic_folder
from neodragon_jax.base.errors import InputError


def names(folder: pathlib.Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_atomic_file_appears_complete(tmp_path):
    path = tmp_path / 'made' / 'weights.safetensors'
    with atomic_file(path) as temporary:
        temporary.write_text('new')
        assert temporary.parent == path.parent and temporary.suffix == path.suffix
        assert not path.exists()
    assert path.read_text() == 'new' and names(path.parent) == [path.name]


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt, SystemExit])
def test_atomic_file_failure_keeps_the_old_content(tmp_path, error):
    path = tmp_path / 'file.txt'
    path.write_text('old')
    with pytest.raises(error), atomic_file(path) as temporary:
        temporary.write_text('half')
        raise error
    assert path.read_text() == 'old' and names(tmp_path) == ['file.txt']


def test_atomic_file_needs_content_and_a_place(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / 'nothing.txt'):
        pass
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='lies under, a file'), atomic_file(tmp_path / 'file' / 'inside.txt'):
        pytest.fail('entered')
    with pytest.raises(InputError, match='is a folder'), atomic_file(tmp_path):
        pytest.fail('entered')


def test_atomic_folder_appears_complete(tmp_path):
    path = tmp_path / 'made' / 'bundle'
    with atomic_folder(path) as temporary:
        (temporary / 'part').write_text('new')
        assert not path.exists()
    assert names(path) == ['part'] and names(path.parent) == ['bundle']


def test_atomic_folder_takes_the_place_of_an_empty_one(tmp_path):
    (tmp_path / 'bundle').mkdir()
    with atomic_folder(tmp_path / 'bundle') as temporary:
        (temporary / 'part').write_text('new')
    assert names(tmp_path / 'bundle') == ['part'] and names(tmp_path) == ['bundle']


def full_folder(path: pathlib.Path) -> pathlib.Path:
    path.mkdir()
    (path / 'old').write_text('old')
    return path


def test_atomic_folder_keeps_content_unless_told(tmp_path):
    path = full_folder(tmp_path / 'bundle')
    with pytest.raises(InputError, match='bundle exists and is not empty'), atomic_folder(path):
        pytest.fail('entered')
    with pytest.raises(InputError, match='is a file'), atomic_folder(path / 'old', replace=True):
        pytest.fail('entered')
    with pytest.raises(InputError, match='not empty'), atomic_folder(tmp_path / 'new') as temporary:
        (temporary / 'part').write_text('new')
        full_folder(tmp_path / 'new')  # Another writer was faster.
    assert names(tmp_path) == ['bundle', 'new'] and names(path) == names(tmp_path / 'new') == ['old']


def test_atomic_folder_replaces_when_told(tmp_path):
    path = full_folder(tmp_path / 'bundle')
    with atomic_folder(path, replace=True) as temporary:
        (temporary / 'part').write_text('new')
        assert names(path) == ['old']
    assert names(path) == ['part'] and names(tmp_path) == ['bundle']


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_atomic_folder_failure_keeps_the_old_content(tmp_path, error):
    path = full_folder(tmp_path / 'bundle')
    with pytest.raises(error), atomic_folder(path, replace=True) as temporary:
        (temporary / 'part').write_text('half')
        raise error
    assert names(path) == ['old'] and names(tmp_path) == ['bundle']


def test_atomic_folder_undoes_half_a_swap(tmp_path, monkeypatch):
    path = full_folder(tmp_path / 'bundle')
    rename = os.rename

    def fail_into_place(source: pathlib.Path, target: pathlib.Path) -> None:
        if target == path and (pathlib.Path(source) / 'part').exists():
            raise OSError('no')
        rename(source, target)

    monkeypatch.setattr(atomic.os, 'rename', fail_into_place)
    with pytest.raises(OSError, match='no'), atomic_folder(path, replace=True) as temporary:
        (temporary / 'part').write_text('new')
    assert names(path) == ['old'] and names(tmp_path) == ['bundle']


def test_atomic_folder_leaves_an_equal_folder_with_its_other_files(tmp_path):
    path = full_folder(tmp_path / 'bundle')
    (path / 'sub').mkdir()
    (path / 'sub' / 'part').write_text('new')
    before = path.stat().st_ino
    for part in ('new', 'NEW'):
        with atomic_folder(path, replace=True, keep_equal=True) as temporary:
            (temporary / 'sub').mkdir()
            (temporary / 'sub' / 'part').write_text(part)
        assert (path.stat().st_ino == before) == ('old' in names(path)) == (part == 'new')
    assert (path / 'sub' / 'part').read_text() == 'NEW' and names(tmp_path) == ['bundle']


@pytest.mark.parametrize('target', ['disk/real', 'disk/not yet made'])
def test_atomic_folder_keeps_a_link_to_another_disk(tmp_path, target):
    (tmp_path / 'disk').mkdir()
    full_folder(tmp_path / 'disk' / 'real')
    (tmp_path / 'link').symlink_to(target)
    for part in ('first', 'second'):
        with atomic_folder(tmp_path / 'link', replace=True) as temporary:
            assert temporary.parent == tmp_path / 'disk'  # a rename does not cross disks
            (temporary / 'part').write_text(part)
        assert (tmp_path / 'link').is_symlink() and (tmp_path / target / 'part').read_text() == part
        assert names(tmp_path / target) == ['part']
    assert names(tmp_path) == ['disk', 'link'] and not any(name.startswith('.') for name in names(tmp_path / 'disk'))
