"""Sizes and SHA-256 of the files of a finished folder; later runs verify the folder with them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from neodragon_jax.base import json_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import file_sha256, naming


@dataclasses.dataclass(frozen=True)
class _Record:
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


FileRecords = Mapping[str, Mapping[str, Any]]  # file name -> `bytes` and `sha256`


def file_records(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Return `bytes` and `sha256` of every file of a folder, by name."""
    return {path.name: record_of(path) for path in sorted(folder.iterdir())}


def digest_line(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file as the line that `sha256sum` writes in its folder."""
    return f'{file_sha256(path)}  {path.name}\n'


def damage(folder: pathlib.Path, records: Any) -> str | None:
    """Return a phrase that describes how the files of a folder differ from their records, or None if they match.

    Sizes are compared before any content is read.
    """
    if not records:
        return 'there is no record of its files'
    try:
        stored = json_file.checked(records, dict[str, _Record], '')
    except InputError:
        return 'the record of its files is damaged'
    for name, record in stored.items():
        path = folder / name
        if not path.is_file():
            return f'{name} is missing'
        size = path.stat().st_size
        if size != record.bytes:
            return f'{name} has {size:,} bytes instead of {record.bytes:,}'
    for name, record in stored.items():
        if file_sha256(folder / name) != record.sha256:
            return f'the content of {name} has changed'
    return None


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if the file is missing, damaged, or holds another type.

    Raises:
      OSError: the system cannot read the file, which may be good; it names the file.
    """
    try:
        with naming(path):
            content = path.read_bytes()
        return json_file.parse_json(content, dict[str, Any], str(path))
    except (FileNotFoundError, IsADirectoryError, InputError):
        return None


def record_of(path: pathlib.Path) -> dict[str, Any]:
    """Return `bytes` and `sha256` of a file."""
    return {'bytes': path.stat().st_size, 'sha256': file_sha256(path)}
