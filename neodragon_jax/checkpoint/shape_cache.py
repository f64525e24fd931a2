"""Shapes of the tensors of a component, kept on disk: computing them traces all layers of its module.

A cache entry is a file in the user's cache folder. Its name is a hash of everything that the shapes follow from: class
and sizes of the component, the source of this package, and the versions of JAX and Flax. A damaged entry is computed
again; without a writable folder, nothing is kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib

import flax
import jax

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.compile_cache import default_folder
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import read_json
from neodragon_jax.checkpoint.abstract import tensor_shapes
from neodragon_jax.config.neodragon import ComponentConfig

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# Number of entries that are kept; one has some ten to hundred kilobytes, and every change of the source makes new ones.
MOST = 128
Shapes = dict[str, tuple[int, ...]]


@functools.cache
def released_shapes(module_class: str, config: ComponentConfig) -> Shapes:
    """Return released name -> shape of every tensor of a component, as `tensor_shapes` computes it."""
    entry = default_folder().parent / 'shapes' / f'{_key(module_class, config)}.json'
    found = _read(entry)
    if found is None:
        found = {name: shape.shape for name, shape in tensor_shapes(module_class, config).items()}
        _write(entry, found)
    return found


def _read(entry: pathlib.Path) -> Shapes | None:
    """Return a stored entry; None if there is none or it is damaged."""
    try:
        stored = read_json(entry, dict[str, list[int]]) if entry.is_file() else None
    except (InputError, OSError):
        return None
    return None if stored is None else {name: tuple(shape) for name, shape in stored.items()}


def _write(entry: pathlib.Path, shapes: Shapes) -> None:
    """Store an entry and remove the oldest ones beyond `MOST`, unless the folder is not writable."""
    try:
        with atomic_file(entry) as partial:
            partial.write_text(json.dumps(shapes))
        kept = sorted(entry.parent.glob('*.json'), key=lambda path: path.stat().st_mtime_ns)
        for old in kept[:-MOST]:
            old.unlink(missing_ok=True)
    except (InputError, OSError):
        return


def _key(module_class: str, config: ComponentConfig) -> str:
    """Return the name of an entry."""
    parts = [module_class, json.dumps(config.to_json(), sort_keys=True), _source(), jax.__version__, flax.__version__]
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()


@functools.cache
def _source() -> str:
    """Return the hash of this package's source."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob('*.py')):
        digest.update(f'{path.relative_to(PACKAGE)}\0'.encode() + path.read_bytes() + b'\0')
    return digest.hexdigest()
