"""Rules of the project that no tool checks: allowed imports, commands, and sizes of files, functions and classes."""

from __future__ import annotations

import ast
import functools
import pathlib
import statistics
import subprocess
import sys

import pytest

from support.goldens import ROOT

# Folders of each package, low to high: imports go to the same folder or a lower one. '' is the package's top.
ORDER = {
    'neodragon_jax': ('base', 'config', 'pyramid', 'models', 'checkpoint', 'generation', 'evaluation', ''),
    'train': (
        *('data', 'shapes', 'runtime', 'flow', 'vae', 'autoencoder', 'decoder', 'super_resolution', 'text'),
        *('teacher', 'pruning', 'dmd', 'aot', 'measure', 'benchmark', ''),
    ),
    'export': ('rewrite', 'graphs', 'measure', 'quantize', 'qnn', 'host', 'report', 'bundle', 'steps', 'phone', ''),
}
# Top-level packages that each of ours must not import.
FORBIDDEN = {
    'neodragon_jax': {'train', 'export', 'configs', 'absl', 'ml_collections', 'optax', 'onnx', 'tensorflow_datasets'},
    'train': {'export', 'configs', 'onnx', 'onnxruntime', 'jax2onnx'},
    'export': {'train', 'configs', 'optax', 'tensorflow_datasets'},
    'configs': {'export'},
}
# The only modules at a package's top that are imported instead of run.
LIBRARY_TOPS = {'neodragon_jax.api'}


@functools.cache
def modules() -> dict[str, pathlib.Path]:
    """Return our modules by dotted name, packages by the package's name."""
    paths = (path for package in FORBIDDEN for path in sorted((ROOT / package).rglob('*.py')))
    named = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path for path in paths}
    # The player is a project of its own inside export/.
    return {name.removesuffix('.__init__'): path for name, path in named.items() if 'export.player' not in name}


@functools.cache
def imports(name: str) -> frozenset[str]:
    """Return the dotted names that a module imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{name}: relative import'
            package, inside = str(node.module), {f'{node.module}.{alias.name}' for alias in node.names}
            names |= inside if inside <= modules().keys() and is_namespace(package) else {package, *inside}
    return frozenset(names - {name})


def is_namespace(package: str) -> bool:
    """Return whether importing a package imports nothing but Python's own modules: it has lazy names, or none."""
    body = ast.parse(modules()[package].read_text()).body if package in modules() else []
    tops = [str(node.module) for node in body if isinstance(node, ast.ImportFrom)]
    tops += [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    return all(name.split('.')[0] in sys.stdlib_module_names for name in tops)


def folder(name: str) -> str:
    """Return the folder of a module below its package, '' for the package's top."""
    parts = modules()[name].relative_to(ROOT).parts
    return parts[1] if len(parts) > 2 else ''


def is_command(name: str) -> bool:
    """Return whether a module is a command for `python -m`."""
    return name.endswith('.__main__') or "if __name__ == '__main__'" in modules()[name].read_text()


@pytest.mark.parametrize('package', FORBIDDEN)
def test_packages_do_not_import_forbidden_packages(package):
    names = [name for name in modules() if name.split('.')[0] == package]
    assert names
    wrong = {name: {other for other in imports(name) if other.split('.')[0] in FORBIDDEN[package]} for name in names}
    assert not {name: others for name, others in wrong.items() if others}


@pytest.mark.parametrize('package', ORDER)
def test_imports_only_go_down(package):
    order = ORDER[package]
    for name in (name for name in modules() if name.split('.')[0] == package and name != package):
        for other in imports(name) & modules().keys():
            if other.split('.')[0] == package and other != package:
                assert order.index(folder(other)) <= order.index(folder(name)), f'{name} imports {other}'


def test_no_module_imports_itself_through_others():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, ' -> '.join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(imports(name) & modules().keys()):
                # `from train import x` names the package, whose __init__ imports nothing of ours.
                if '.' in other or imports(other) & modules().keys():
                    visit(other, (*path, name))
            done.add(name)

    for name in modules():
        visit(name, ())


def test_nothing_imports_a_command():
    wrong = [(name, other) for name in modules() for other in imports(name) & modules().keys() if is_command(other)]
    assert not wrong


def test_the_top_of_a_package_holds_commands():
    tops = {name for name in modules() if not folder(name) and '.' in name and not name.startswith('configs.')}
    assert {name for name in tops if not is_command(name)} <= LIBRARY_TOPS


def test_only_commands_know_the_parser():
    wrong = [name for name, path in modules().items() if 'Namespace' in path.read_text() and not is_command(name)]
    assert not wrong


def test_sizes():
    """Nine files in ten are under 320 lines, nine functions in ten under 21; no function over 80, no class over 200."""
    files, functions, classes = [], {}, {}
    for path in [*modules().values(), *(ROOT / 'tests').rglob('*.py')]:
        text = path.read_text()
        files.append(text.count('\n'))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                (classes if isinstance(node, ast.ClassDef) else functions)[path, node.name, node.lineno] = lines
    assert statistics.quantiles(files, n=10)[-1] < 320
    assert statistics.quantiles(functions.values(), n=10)[-1] <= 20
    assert not {name: lines for name, lines in functions.items() if lines > 80}
    assert not {name: lines for name, lines in classes.items() if lines > 200}


def test_version_is_a_constant():
    """Installing reads it from the source; a package without it does not install."""
    body = ast.parse(modules()['neodragon_jax'].read_text()).body
    names = [
        node.targets[0].id for node in body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    ]
    assert '__version__' in names and 'attr: neodragon_jax.__version__' in (ROOT / 'setup.cfg').read_text()


def test_library_needs_no_extra():
    """Importing everything in the library loads none of the extras' packages."""
    names = [name for name in modules() if name.startswith('neodragon_jax') and not name.endswith('__main__')]
    extras = ('optax', 'onnx', 'onnxruntime', 'tensorflow_datasets', 'grain', 'ml_collections')
    code = f'import sys, {", ".join(names)}\nprint([name for name in {extras!r} if name in sys.modules])'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == '[]'
