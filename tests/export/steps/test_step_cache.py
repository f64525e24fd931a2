"""Finished steps: reuse, and repetition of damaged ones."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from export.steps.step_cache import METADATA, finished_or_made
from support.lost_files import lose

SOURCE = {'weights': 'abc', 'sizes': (1, 2)}


class Step:
    """A step that counts its executions."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.made = folder, 0

    def __call__(self, source: dict[str, Any] = SOURCE) -> dict[str, Any]:
        return finished_or_made(self.folder, source, self._write)

    def _write(self, draft: pathlib.Path) -> dict[str, Any]:
        self.made += 1
        (draft / 'graph.onnx').write_bytes(b'graph' * 100)
        (draft / 'graph.onnx.data').write_bytes(b'weights' * 100)
        return {'operations': 7}


@pytest.fixture
def step(tmp_path) -> Step:
    made = Step(tmp_path / 'step')
    made()
    return made


def test_a_finished_step_is_kept(step, capsys):
    assert step()['operations'] == 7 and step.made == 1
    assert capsys.readouterr().out == ''


def test_other_sources_make_it_again_without_a_complaint(step, capsys):
    step({'weights': 'other'})
    assert step.made == 2 and capsys.readouterr().out == ''


def test_a_record_that_the_system_cannot_read_is_not_damaged(step, monkeypatch):
    """Making the step again can take hours."""
    lose(monkeypatch, METADATA)
    with pytest.raises(OSError, match=METADATA):
        step()
    monkeypatch.undo()
    assert step()['operations'] == 7 and step.made == 1


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: pathlib.Path) -> None:
    path.write_bytes(b'G' + path.read_bytes()[1:])


def empty(path: pathlib.Path) -> None:
    path.write_bytes(b'')


def make_folder(path: pathlib.Path) -> None:
    path.unlink()
    path.mkdir()


def forget_files(path: pathlib.Path) -> None:
    metadata = json.loads(path.read_text())
    del metadata['files']
    path.write_text(json.dumps(metadata))


@pytest.mark.parametrize('name', ['graph.onnx', 'graph.onnx.data'])
@pytest.mark.parametrize('harm', [pathlib.Path.unlink, cut, flip, empty, make_folder])
def test_a_damaged_file_is_made_again_and_reported(name, harm: Callable[[pathlib.Path], None], step, capsys):
    harm(step.folder / name)
    assert step()['operations'] == 7 and step.made == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert str(step.folder) in line and name in line and 'making it again' in line
    step()
    assert step.made == 2


@pytest.mark.parametrize('harm', [pathlib.Path.unlink, cut, empty, make_folder, forget_files])
def test_damaged_metadata_is_made_again_and_reported(harm: Callable[[pathlib.Path], None], step, capsys):
    harm(step.folder / METADATA)
    step()
    assert step.made == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert str(step.folder) in line and 'making it again' in line


def test_a_failed_step_leaves_nothing(tmp_path):
    def fail(draft: pathlib.Path) -> dict[str, Any]:
        (draft / 'half').write_bytes(b'x')
        raise OSError(28, 'No space left on device')

    with pytest.raises(OSError, match='No space left'):
        finished_or_made(tmp_path / 'step', SOURCE, fail)
    assert not list(tmp_path.iterdir())
