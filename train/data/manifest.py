"""The files of a dataset folder that tell what the others must be."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from neodragon_jax.base.errors import InputError

FORMAT = 2
SPLIT = 'train'
MANIFEST = 'manifest.json'
# Conditionings stored once beside the samples: what guidance steers away from, and what a dropped caption becomes.
NEGATIVE, NULL = 'negative', 'null'


def is_dataset(folder: pathlib.Path) -> bool:
    """Return whether a folder was made by a SampleWriter, complete or not."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Return the manifest of a dataset folder, or say what is wrong with it."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f'{folder}: no such folder. Pass a folder that SampleWriter made.')
    if not path.is_file():
        inside = sorted(child.name for child in folder.iterdir() if is_dataset(child))
        if inside:
            raise InputError(f'{folder}: holds several datasets; pass one of them: {", ".join(inside)}.')
        raise InputError(f'{folder}: no {MANIFEST} in it. Pass a folder that SampleWriter made, or copy it again.')
    try:
        manifest = json.loads(path.read_text())
        version = manifest['format']
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise InputError(f'{path}: not a manifest. Copy the folder again.') from None
    if version != FORMAT:
        raise InputError(f'{path}: format {version}, this program reads format {FORMAT}. Write the samples again.')
    return manifest


def check_shard(path: pathlib.Path, record: Mapping[str, Any], verify: bool) -> None:
    """Raise InputError unless a shard file is what the manifest recorded."""
    if not path.is_file():
        raise InputError(f'{path}: missing. Copy the folder again, or delete its record in shards/ and run the writer.')
    size = path.stat().st_size
    if size != record['bytes']:
        raise InputError(f'{path}: {size} bytes, its manifest says {record["bytes"]}. Copy the file again.')
    if verify:
        with path.open('rb') as file:
            if hashlib.file_digest(file, 'sha256').hexdigest() != record['sha256']:
                raise InputError(f'{path}: its content is not what its manifest recorded. Copy the file again.')


def write_json(path: pathlib.Path, value: Any, part: int) -> None:
    """Write JSON that appears under its name when complete.

    Args:
      part: the writer's; it makes the temporary name, so that what a killed writer left is overwritten, not kept.
    """
    partial = path.with_name(f'.partial-{part}-{path.name}')
    partial.write_text(json.dumps(value, indent=2) + '\n')
    os.replace(partial, path)
