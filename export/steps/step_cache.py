"""Finished steps on disk: each is a folder with metadata.json, which records the step's inputs and files.

A step is skipped if its folder was made from the same inputs and its files still have the recorded sizes and hashes.
Otherwise it is made again; damaged files are reported in one line.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tqdm

from export.host.file_records import damage, file_records, read_json
from export.measure.resources import measured
from neodragon_jax.base.atomic import atomic_folder
from neodragon_jax.base.json_file import as_json, parse_json

METADATA = 'metadata.json'


def finished(folder: pathlib.Path, source: dict[str, Any], record: pathlib.Path | None = None) -> dict[str, Any] | None:
    """Return the metadata of a finished step, or None if the step has to be made.

    Args:
      folder: folder of the step.
      source: inputs of the step, as JSON values.
      record: file of the metadata; None if it is METADATA in the folder.
    """
    if not folder.is_dir():
        return None
    record = record or folder / METADATA
    metadata = read_json(record)
    if metadata is None:
        return _remade(folder, f'{record.name} is missing or damaged')
    if metadata.get('source') != as_json(source):
        return None
    harm = damage(folder, metadata.get('model_files', metadata.get('files')))
    return metadata if harm is None else _remade(folder, harm)


def finished_or_made(
    folder: pathlib.Path, source: dict[str, Any], write: Callable[[pathlib.Path], dict[str, Any]]
) -> dict[str, Any]:
    """Return the metadata of a step; make the step unless it is finished.

    Args:
      folder: folder of the step; it is created when the step is complete.
      source: inputs of the step, as JSON values.
      write: writes the step's files into a folder and returns further metadata.
    """
    metadata = finished(folder, source)
    if metadata is None:
        with atomic_folder(folder, replace=True) as draft:
            with measured() as resources:
                metadata = write(draft)
            metadata |= {'resources': resources, 'source': source, 'files': file_records(draft)}
            text = json.dumps(metadata, indent=2, default=_plain)
            (draft / METADATA).write_text(text + '\n')
            metadata = parse_json(text, dict[str, Any], METADATA)
    return metadata


def print_line(line: str) -> None:
    """Print a line without disturbing progress bars."""
    tqdm.tqdm.write(line)


def _remade(folder: pathlib.Path, reason: str) -> None:
    """Report that a damaged step is made again."""
    print_line(f'{folder}: {reason}; making it again')


def _plain(value: Any) -> Any:
    """Return a NumPy number as a Python number."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f'{type(value).__name__} in metadata')
