"""The code and tools that a step's result depends on, by hash and version.

The code is the step's module and every module of this project that it imports or runs in another process, directly or
indirectly. Imports for type checking count, too: an argument brings the code of its type. A module runs in another
process by its full name, such as 'export.qnn.htp_worker'; the name as a string constant counts as an import. Comments,
docstrings and layout are ignored, so that editing them does not invalidate finished steps.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from export.qnn.compile import tool_versions

_ROOT = pathlib.Path(__file__).parents[2]
_PACKAGES = ('export', 'neodragon_jax')
# The module whose code records calls, the packages that compute them, and JAX's settings of noise and precision.
RECORDING_CODE = 'export.host.recording_program'
_RECORDING_PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'transformers', 'tokenizers', 'ftfy')
_JAX_SETTINGS = ('jax_enable_x64', 'jax_default_prng_impl', 'jax_threefry_partitionable')


def made_by(module: str) -> dict[str, Any]:
    """Return the identity of the code of a module and of the tools, for the metadata of a step.

    Args:
      module: full name of the module that makes the result.
    """
    return {'code_sha256': code_sha256(module), 'tool_versions': tool_versions()}


def recorded_by() -> dict[str, Any]:
    """Return the identity of the code, packages and settings that record calls, for the protocol.

    Recording takes longest of all steps. Only packages that compute the numbers count, and no module that only exported
    graphs need.
    """
    return {
        'code_sha256': code_sha256(RECORDING_CODE),
        'package_versions': {name: importlib.metadata.version(name) for name in _RECORDING_PACKAGES},
        'jax_settings': {name: jax.config.values[name] for name in _JAX_SETTINGS},
    }


@functools.cache
def code_sha256(module: str, root: pathlib.Path = _ROOT) -> str:
    """Return the SHA-256 of a module and of its import closure within the project, without comments and docstrings.

    Args:
      module: full name of a module of the project.
      root: folder that holds the packages.
    """
    digest = hashlib.sha256()
    for name in sorted(import_closure(module, root)):
        digest.update(f'{name}\n{ast.dump(_without_docstrings(_parse(name, root)))}\n'.encode())
    return digest.hexdigest()


def import_closure(module: str, root: pathlib.Path = _ROOT) -> set[str]:
    """Return the names of a module and of all modules of the project that it imports or names, directly or indirectly.

    Imports inside functions and under TYPE_CHECKING are included. The __init__ files of parent packages are not.
    """
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found and _file(name, root) is not None:
            found.add(name)
            waiting += _imported(_parse(name, root))
    return found


def _imported(tree: ast.AST) -> Iterator[str]:
    """Yield the names of modules of the project that may be imported or run by a syntax tree."""
    if isinstance(tree, ast.Import):
        names = [alias.name for alias in tree.names]
    elif isinstance(tree, ast.ImportFrom) and tree.module:
        names = [tree.module, *(f'{tree.module}.{alias.name}' for alias in tree.names)]
    elif isinstance(tree, ast.Constant) and _is_dotted_name(tree.value):
        names = [str(tree.value)]
    else:
        names = []
    yield from (name for name in names if name.split('.')[0] in _PACKAGES)
    for child in ast.iter_child_nodes(tree):
        yield from _imported(child)


def _is_dotted_name(value: object) -> bool:
    """Return whether a value may be the full name of a module."""
    return isinstance(value, str) and '.' in value and all(part.isidentifier() for part in value.split('.'))


def _file(name: str, root: pathlib.Path) -> pathlib.Path | None:
    """Return the file of a module, or None if there is no such module."""
    path = root.joinpath(*name.split('.'))
    for file in (path.with_suffix('.py'), path / '__init__.py'):
        if file.is_file():
            return file
    return None


@functools.cache
def _parse(name: str, root: pathlib.Path) -> ast.Module:
    file = _file(name, root)
    assert file is not None
    return ast.parse(file.read_text(encoding='utf-8'))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """Remove the docstrings of a module and of everything in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            del node.body[0]
    return tree
