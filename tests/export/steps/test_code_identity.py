"""The identity of the code of steps: the closures of their imports, workers and arguments."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable

import pytest

from export.steps.code_identity import RECORDING_CODE, code_sha256, import_closure, recorded_by
from export.steps.evaluation import RATIOS_CODE
from export.steps.graph import COMPILE_CODE, FLOAT_CODE, PRECISE_CODE
from support.goldens import ROOT

MODULE = '''"""A."""
from export import b


def f():
    """F."""
    from neodragon_jax.c import g
    return g, ['-m', 'export.worker']
'''
PACKAGE = {
    'export/a.py': MODULE,
    'export/b.py': 'X = 1  # one\n',
    'export/unused.py': 'Y = 1\n',
    'export/worker.py': 'W = 1\n',
    'export/types.py': 'T = 1\n',
    'neodragon_jax/c.py': 'from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import export.types\ng = 1\n',
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


@pytest.mark.parametrize(
    ('file', 'text'),
    [
        ('export/b', 'X = 2\n'),
        ('neodragon_jax/c', 'g = 2\n'),
        pytest.param('export/worker', 'W = 2\n', id='run in another process'),
        pytest.param('export/types', 'T = 2\n', id='type of an argument'),
    ],
)
def test_code_that_runs_changes_the_identity(file, text, project):
    changed = PACKAGE['neodragon_jax/c.py'].replace('g = 1', text) if file == 'neodragon_jax/c' else text
    assert project(**{file: changed}) != project()


@functools.cache
def code() -> dict[str, ast.Module]:
    """Return the syntax trees of the export's modules by name, without the player, a project of its own."""
    paths = [path for path in (ROOT / 'export').rglob('*.py') if 'player' not in path.parts]
    return {
        '.'.join(path.relative_to(ROOT).with_suffix('').parts): ast.parse(path.read_text()) for path in sorted(paths)
    }


def docstrings(tree: ast.Module) -> set[int]:
    """Return the identities of the nodes that are docstrings."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node)]
    return {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}


def names(tree: ast.Module, word: str) -> bool:
    """Return whether a string of the code, docstrings left out, has a word."""
    left_out = docstrings(tree)
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return any(word in str(node.value) for node in strings if id(node) not in left_out)


def test_every_worker_is_in_the_closure_of_the_module_that_runs_it():
    """A worker is a module below the top that can be run; a path or a part of its name must not hide it."""
    workers = [name for name, tree in code().items() if name.count('.') > 1 and names(tree, '__main__')]
    assert {'export.qnn.htp_worker', 'export.quantize.adaround_worker'} <= set(workers)
    for worker in workers:
        starters = [name for name, tree in code().items() if names(tree, worker.rpartition('.')[2])]
        assert starters, f'nothing runs {worker}'
        assert not [name for name in starters if worker not in import_closure(name)], f'name {worker} in full'


@pytest.mark.parametrize(
    ('module', 'runs'),
    [
        (FLOAT_CODE, {'export.graphs.denoiser', 'neodragon_jax.models.attention'}),
        (PRECISE_CODE, {'export.quantize.two_parts', 'export.quantize.adaround_worker', 'export.host.denoiser_host'}),
        (COMPILE_CODE, {'export.qnn.htp', 'export.qnn.htp_worker', 'export.qnn.static_view'}),
        (RATIOS_CODE, {'export.graphs.runners', 'export.measure.snr', 'export.qnn.htp_worker'}),
        (RECORDING_CODE, {'export.host.recording', 'neodragon_jax.pyramid.sampler', 'neodragon_jax.models.mmdit'}),
    ],
)
def test_closures_of_the_steps_hold_their_code_and_no_more(module, runs):
    closure = import_closure(module)
    assert runs <= closure
    assert not [name for name in closure if name.startswith(('export.report', 'export.bundle'))]


def test_unrelated_code_does_not_repeat_recordings_and_measurements():
    """They take longest: quantization, compilation, reports and the denoiser's graphs may change."""
    recording, ratios = import_closure(RECORDING_CODE), import_closure(RATIOS_CODE)
    graphs = {'export.graphs.denoiser', 'export.host.denoiser_graphs', 'export.host.denoiser_host'}
    assert not graphs & recording
    parts = ('export.quantize', 'export.qnn', 'export.rewrite', 'export.steps', 'export.measure')
    assert not [name for name in recording if name.startswith(parts)]
    others = {name for name in ratios if name.startswith(('export.quantize', 'export.rewrite', 'export.steps'))}
    assert others == {RATIOS_CODE} and 'export.qnn.compile' not in ratios


def test_recordings_depend_on_packages_and_settings(monkeypatch):
    import jax

    before = recorded_by()
    assert {'jax', 'numpy', 'transformers'} <= set(before['package_versions'])
    monkeypatch.setattr('importlib.metadata.version', lambda name: '0')
    assert recorded_by()['package_versions'] != before['package_versions']
    with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):  # pyright: ignore
        assert recorded_by()['jax_settings'] != before['jax_settings']
