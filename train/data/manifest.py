"""The manifest of a sample set: its plan, its protocol, and the size and hash of every file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import file_sha256
from neodragon_jax.base.json_file import as_json, checked, read_json
from train.data.record_spec import RecordSpec
from train.data.shard_layout import ShardLayout

FORMAT = 3
# Format 2 has no checksum of its own and no hashes of the conditionings.
READABLE = (2, FORMAT)
MANIFEST = 'manifest.json'
CHECKSUM = 'checksum'

Positive = Annotated[int, Field(ge=1, le=2**48)]


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """A shard's file name, number of samples, size and SHA-256."""

    file: Annotated[str, Field(pattern=r'^[^/\\]+$')]
    count: Positive
    bytes: Positive
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return the record as a manifest stores it."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class _Content:
    """The content of a manifest's file, without its checksum."""

    format: int
    name: Annotated[str, Field(pattern=r'^[^/\\]+$')]
    count: Positive
    samples_per_shard: Positive
    spec: dict[str, Any]
    protocol: dict[str, Any]
    complete: bool
    shards: list[ShardRecord]
    conditioning: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A read manifest.

    Attributes:
      plan: settings that every writer of the set must share.
      conditioning: name of a stored conditioning -> SHA-256 of its file.
      complete: whether all samples are written.
    """

    layout: ShardLayout
    plan: dict[str, Any]
    spec: RecordSpec
    protocol: dict[str, Any]
    shards: tuple[ShardRecord, ...]
    conditioning: dict[str, str]
    complete: bool


def make_plan(name: str, count: int, samples_per_shard: int, spec: RecordSpec, protocol: Mapping[str, Any]) -> dict:
    """Return the settings that every writer of a set must share, as JSON reads them back."""
    plan = {'format': FORMAT, 'name': name, 'count': count, 'samples_per_shard': samples_per_shard}
    return as_json(plan | {'spec': spec.to_json(), 'protocol': dict(protocol)})


def is_sample_set(folder: pathlib.Path) -> bool:
    """Tell whether a folder was made by a SampleWriter, complete or not."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Return the manifest of a sample set.

    Raises:
      InputError: the folder is no sample set, or its manifest is damaged.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f'{folder}: no such folder. Pass a folder that SampleWriter made.')
    if not path.is_file():
        inside = sorted(child.name for child in folder.iterdir() if is_sample_set(child))
        if inside:
            raise InputError(f'{folder}: holds several sample sets; pass one of them: {", ".join(inside)}.')
        raise InputError(f'{folder}: no {MANIFEST} in it. Pass a folder that SampleWriter made, or copy it again.')
    manifest = read_json(path, dict[str, Any])
    version = manifest.get('format')
    if version not in READABLE:
        raise InputError(
            f'{path}: format {str(version)[:20]}, this program reads format {FORMAT}. Write the samples again.'
        )
    if (CHECKSUM in manifest or version == FORMAT) and manifest.pop(CHECKSUM, None) != _checksum(manifest):
        raise InputError(f'{path}: its content is not as it was written. Copy the folder again.')
    return _parse(folder, manifest)


def _parse(folder: pathlib.Path, manifest: dict[str, Any]) -> Manifest:
    """Return a manifest from JSON.

    Raises:
      InputError: a value is missing or wrong.
    """
    path = folder / MANIFEST
    content = checked(manifest, _Content, str(path))
    plan = {key: manifest[key] for key in ('format', 'name', 'count', 'samples_per_shard', 'spec', 'protocol')}
    layout = ShardLayout(folder, content.name, content.count, content.samples_per_shard)
    # The lengths first: a damaged count may ask for any number of shards.
    if content.complete and (
        len(content.shards) != len(layout.shards)
        or [record.count for record in content.shards] != [len(layout.samples(shard)) for shard in layout.shards]
    ):
        raise InputError(
            f'{path}: its shards do not hold the {content.count} samples of its plan. Copy the folder again.'
        )
    spec = RecordSpec.from_json(content.spec, f'{path}: spec')
    return Manifest(layout, plan, spec, content.protocol, tuple(content.shards), content.conditioning, content.complete)


def write_manifest(
    folder: pathlib.Path,
    plan: Mapping[str, Any],
    part: int,
    shards: Sequence[ShardRecord] = (),
    conditioning: Mapping[str, str] | None = None,
) -> None:
    """Write the manifest of a set: of its plan alone, or of the complete set with its shards."""
    content = dict(plan) | {'complete': bool(shards), 'shards': [shard.to_json() for shard in shards]}
    content['conditioning'] = dict(conditioning or {})
    write_json(folder / MANIFEST, content | {CHECKSUM: _checksum(content)}, part)


def _checksum(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content, without its checksum."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_shard(path: pathlib.Path, record: ShardRecord, verify: bool) -> None:
    """Raise InputError unless a shard's file has the recorded size and, if asked, SHA-256."""
    if not path.is_file():
        raise InputError(f'{path}: missing. Copy the folder again, or delete its record in shards/ and run the writer.')
    size = path.stat().st_size
    if size != record.bytes:
        raise InputError(f'{path}: {size} bytes, its manifest says {record.bytes}. Copy the file again.')
    if verify and file_sha256(path) != record.sha256:
        raise InputError(f'{path}: its content differs from its manifest. Copy the file again.')


def write_json(path: pathlib.Path, value: Any, part: int) -> None:
    """Write a JSON file that appears under its final name when complete.

    Args:
      part: part of the writer, for the temporary name, so that the next writer overwrites the file of a killed one.
    """
    partial = path.with_name(f'.partial-{part}-{path.name}')
    partial.write_text(json.dumps(value, indent=2) + '\n')
    os.replace(partial, path)
