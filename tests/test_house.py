"""Rules of the house that no tool checks: which package may import which."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

from support.goldens import ROOT

FORBIDDEN = {
    'neodragon_jax': {'train', 'export', 'configs', 'absl', 'ml_collections', 'optax', 'onnx', 'tensorflow_datasets'},
    'train': {'export', 'onnx', 'onnxruntime', 'jax2onnx'},
    'export': {'train', 'optax', 'tensorflow_datasets'},
}


def imported(path: pathlib.Path) -> set[str]:
    """Return the top-level packages that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or '').split('.')[0])
    return names


@pytest.mark.parametrize('package', FORBIDDEN)
def test_arrows_point_forward(package):
    files = sorted((ROOT / package).rglob('*.py'))
    assert files
    wrong = {str(path): imported(path) & FORBIDDEN[package] for path in files}
    assert not {path: names for path, names in wrong.items() if names}


def test_sampler_and_models_do_not_know_each_other():
    sampler = (ROOT / 'neodragon_jax' / 'pyramid' / 'sampler.py').read_text()
    assert 'neodragon_jax.models' not in sampler
    for path in (ROOT / 'neodragon_jax' / 'models').glob('*.py'):
        assert 'sampler' not in path.read_text(), path


def test_library_needs_no_extra():
    """Importing everything in the library loads none of the extras' packages."""
    modules = [
        '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        for path in (ROOT / 'neodragon_jax').rglob('*.py')
        if path.name != '__main__.py'
    ]
    extras = ('optax', 'onnx', 'onnxruntime', 'tensorflow_datasets', 'grain', 'ml_collections')
    code = f'import sys, {", ".join(modules)}\nprint([name for name in {extras!r} if name in sys.modules])'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == '[]'
