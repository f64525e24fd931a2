"""Finished steps: reuse, repetition of damaged ones, and the identity of their code."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from export.steps.code_identity import code_sha256, import_closure
from export.steps.step_cache import METADATA, finished_or_made

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


MODULE = '''"""A."""
from export import b


def f():
    """F."""
    from neodragon_jax.c import g
    return g
'''
PACKAGE = {
    'export/a.py': MODULE,
    'export/b.py': 'X = 1  # one\n',
    'export/unused.py': 'Y = 1\n',
    'neodragon_jax/c.py': 'from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import export.unused\ng = 1\n',
}


@pytest.fixture
def project(tmp_path) -> Callable[..., str]:
    """Return a function that hashes module export.a of a project whose files are changed as given."""
    count = 0

    def hashed(**changes: str) -> str:
        nonlocal count
        count += 1
        root = tmp_path / str(count)
        for name, text in (PACKAGE | {f'{key}.py': value for key, value in changes.items()}).items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return code_sha256('export.a', root)

    return hashed


@pytest.mark.parametrize(
    ('file', 'text'),
    [
        ('export/a', MODULE.replace('"""A."""', '"""Another."""').replace('"""F."""', '"""More."""')),
        ('export/b', '# a comment\nX    = 1\n'),
        ('export/unused', 'Y = 2\n'),
    ],
)
def test_documentation_and_unused_modules_do_not_change_the_identity(file, text, project):
    assert project(**{file: text}) == project()


@pytest.mark.parametrize(('file', 'text'), [('export/b', 'X = 2\n'), ('neodragon_jax/c', 'g = 2\n')])
def test_code_that_is_imported_changes_the_identity(file, text, project):
    assert project(**{file: text}) != project()


def test_closures_of_the_steps_hold_their_code_and_no_more():
    compiler = import_closure('export.qnn.compile')
    assert {'export.qnn.htp', 'export.qnn.static_view'} <= compiler
    quantization = import_closure('export.steps.quantization')
    assert {'export.quantize.two_parts', 'export.quantize.ranges'} <= quantization
    assert 'neodragon_jax.models.attention' in import_closure('export.steps.float_graph')
    for closure in (compiler, quantization):
        assert not [name for name in closure if name.startswith('export.report')]
