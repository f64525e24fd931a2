"""Conditionings stored once beside the samples of a set: the negative prompt's, and the empty prompt's."""

from __future__ import annotations

import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import file_sha256
from train.data.manifest import Manifest
from train.data.record_spec import RecordSpec

# The prompt that guidance steers away from, and the empty one, which takes the place of dropped captions.
NEGATIVE, NULL = KINDS = 'negative', 'null'


def conditioning_path(folder: pathlib.Path, kind: str) -> pathlib.Path:
    """Return the file of a conditioning."""
    return folder / f'{kind}.npz'


def write_conditioning(folder: pathlib.Path, kind: str, arrays: Mapping[str, Any], spec: RecordSpec) -> None:
    """Write the conditioning of one prompt: some arrays of the set's spec."""
    where = f'{folder}: {kind} conditioning'
    stored = {name: spec.conform(name, value, where) for name, value in arrays.items()}
    # NumPy files do not support bfloat16; float32 represents every bfloat16 exactly.
    wide = {name: array.astype(np.float32) if array.dtype.kind == 'V' else array for name, array in stored.items()}
    with atomic_file(conditioning_path(folder, kind)) as path, path.open('wb') as file:
        np.savez(file, **wide)


def conditioning_hashes(folder: pathlib.Path) -> dict[str, str]:
    """Return the name and SHA-256 of every conditioning in a folder."""
    paths = {kind: conditioning_path(folder, kind) for kind in KINDS}
    return {kind: file_sha256(path) for kind, path in paths.items() if path.is_file()}


def read_conditioning(manifest: Manifest, kind: str) -> dict[str, np.ndarray]:
    """Return a stored conditioning.

    Raises:
      InputError: the set has none, or its file is damaged.
    """
    folder, spec = manifest.layout.folder, manifest.spec
    path = conditioning_path(folder, kind)
    if not path.is_file():
        raise InputError(f'{folder}: no {path.name} in it; write it with SampleWriter.write_conditioning.')
    if kind in manifest.conditioning and file_sha256(path) != manifest.conditioning[kind]:
        raise InputError(f'{path}: its content differs from its manifest. Copy the file again.')
    try:
        with np.load(path) as arrays:
            stored = {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError):
        raise InputError(f'{path}: damaged, or not an npz file. Copy the file again.') from None
    unknown = sorted(stored.keys() - spec.arrays.keys())
    if unknown or not stored:
        held = ', '.join(unknown) or 'nothing'
        raise InputError(f'{path}: holds {held}, not arrays of the samples. Copy the file again.')
    return {name: spec.conform(name, array, str(path)) for name, array in stored.items()}
