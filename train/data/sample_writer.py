"""Writing a sample set, resumable after any interruption, because making the samples may take days.

A shard that is being written is a journal of finished samples; see `train.data.shards` for how it is completed. A
process killed at any moment loses only the sample that it was writing.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from neodragon_jax.base.atomic import PathLike
from neodragon_jax.base.bucket import is_bucket
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import read_json
from neodragon_jax.base.paths import storage_path
from train.data.bucket_set import BucketSet
from train.data.journal import Journal
from train.data.manifest import MANIFEST, ShardRecord, make_plan, read_manifest, write_manifest
from train.data.record_spec import INDEX, RecordSpec
from train.data.shard_layout import ShardLayout
from train.data.shards import complete, recover
from train.data.stored_conditioning import NEGATIVE, conditioning_hashes, conditioning_path, write_conditioning
from train.data.tfds_metadata import METADATA, write_metadata


class SampleWriter:
    """Writes samples in shards; a new writer on the same folder continues after the last finished sample.

        with SampleWriter(folder, spec, count, protocol={...}) as writer:
            for index in writer.missing():
                writer.append({'index': index, 'prompt': ..., 'latents': ..., 'text': ..., ...})

    Several processes write together when each takes its own `part`. The last one to finish completes the set: it writes
    the metadata of TFDS, and the manifest with the size and the SHA-256 of every file.

    Attributes:
      state: whether the set was complete when this writer closed, as text for the user.
    """

    state: str

    def __init__(
        self,
        folder: PathLike,
        spec: RecordSpec,
        count: int,
        *,
        protocol: Mapping[str, Any],
        samples_per_shard: int = 256,
        part: int = 0,
        parts: int = 1,
        name: str = 'teacher_samples',
    ) -> None:
        """Begin or continue a sample set.

        Args:
          folder: made if absent; in a bucket, complete shards are uploaded from the user's cache folder.
          count: samples in the whole set.
          protocol: JSON with the settings that the samples depend on, the same for every writer.
          part, parts: this writer's share of the shards.
          name: dataset name in TFDS.
        Raises:
          InputError: the folder holds a set with another plan, or another process is writing this part.
        """
        if count < 1 or samples_per_shard < 1 or not 0 <= part < parts:
            raise InputError(
                f'SampleWriter: count={count}, samples_per_shard={samples_per_shard}, part={part} of {parts}; '
                'the first two are positive and part is in 0..parts-1.'
            )
        given = storage_path(folder, '--out')
        self._bucket = BucketSet(given) if is_bucket(given) else None
        local = pathlib.Path(given) if self._bucket is None else self._bucket.local
        self._layout = ShardLayout(local, name, count, samples_per_shard)
        self._spec, self._part = spec, part
        self._plan = make_plan(name, count, samples_per_shard, spec, protocol)
        self._serialize = spec.serializer()
        self._begin()
        shards = self._layout.shards[part::parts]
        for shard in shards:
            recover(self._layout, shard, part)
        if self._bucket is not None:
            self._bucket.resume(self._layout)
        self._todo = [index for shard in shards for index in recover(self._layout, shard, part)]
        self._position, self.state = 0, ''
        self._journal: Journal | None = None

    def _begin(self) -> None:
        """Write the plan, or check that the folder was begun with the same one."""
        folder = self._layout.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f'{folder} is or lies under a file; choose another folder.') from None
        if not (folder / MANIFEST).exists():
            write_manifest(folder, self._plan, self._part)
            self._push(folder / MANIFEST)
            return
        begun = read_manifest(folder).plan | {'format': self._plan['format']}
        for key, value in self._plan.items():
            if begun[key] != value:
                raise InputError(
                    f'{folder}: was begun with {_difference(key, begun[key], value)}; choose another '
                    'folder, or continue with the same settings.'
                )

    def missing(self) -> list[int]:
        """Return the indices that this part must still write, in the order in which to append them."""
        return self._todo[self._position :]

    def append(self, sample: Mapping[str, Any]) -> None:
        """Add the next missing sample; floating-point arrays are rounded to the stored type.

        Raises:
          InputError: it is not the next one, or a value does not fit the spec.
        """
        index, where = int(sample[INDEX]), f'{self._layout.folder}: sample {sample[INDEX]}'
        if self._position == len(self._todo) or index != self._todo[self._position]:
            expected = self._todo[self._position] if self._position < len(self._todo) else 'none: all are written'
            raise InputError(f'{where} is out of order; append the indices of missing() in turn (next: {expected}).')
        absent = [name for name in self._spec.names() if name not in sample]
        if absent:
            raise InputError(f'{where} has no {", ".join(absent)}; pass all arrays, texts and bytes of the spec.')
        values = {name: self._spec.conform(name, sample[name], where) for name in self._spec.names()}
        shard = index // self._layout.samples_per_shard
        if self._journal is None:
            self._journal = self._open(shard, index)
        self._journal.append(self._serialize(values | {INDEX: index}))
        self._position += 1
        if index == self._layout.samples(shard)[-1]:
            complete(self._layout, shard, self._journal, self._part)
            self._journal = None
            if self._bucket is not None:
                self._bucket.push_shard(self._layout, shard)

    def _open(self, shard: int, index: int) -> Journal:
        """Return the journal of a shard, ready for a sample."""
        layout = self._layout
        journal = Journal(layout.journal_path(shard))
        if journal.count != index - layout.samples(shard)[0] or layout.record_path(shard).exists():
            journal.close()
            raise InputError(f'{layout.folder}: another process has written part {self._part} meanwhile; start one.')
        return journal

    def write_negative(self, text: np.ndarray, text_mask: np.ndarray, pooled: np.ndarray) -> None:
        """Store the conditioning that guidance steers away from, once beside the samples."""
        self.write_conditioning(NEGATIVE, {'text': text, 'text_mask': text_mask, 'pooled': pooled})

    def write_conditioning(self, kind: str, arrays: Mapping[str, Any]) -> None:
        """Store the conditioning of one prompt beside the samples: some arrays of their spec.

        Args:
          kind: NEGATIVE or NULL.
        """
        write_conditioning(self._layout.folder, kind, arrays, self._spec)
        self._push(conditioning_path(self._layout.folder, kind))

    def _push(self, *paths: pathlib.Path) -> None:
        """Upload files of a set in a bucket."""
        if self._bucket is not None:
            self._bucket.push(*paths)

    def close(self) -> bool:
        """Keep the written samples; return whether the whole set is complete, which makes it readable."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        layout = self._layout
        if self._bucket is not None:
            self._bucket.pull()
        missing = sum(not layout.record_path(shard).exists() for shard in layout.shards)
        if missing:
            self.state = (
                f'{missing} of {len(layout.shards)} shards of the set are missing; the process that finishes last '
                'completes it'
            )
            return False
        shards = [_read_record(layout.record_path(shard)) for shard in layout.shards]
        write_metadata(layout, self._spec, shards, self._part)
        write_manifest(layout.folder, self._plan, self._part, shards, conditioning_hashes(layout.folder))
        self._push(*(layout.folder / name for name in METADATA))
        self._push(layout.folder / MANIFEST)
        self.state = 'the set is complete'
        return True

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _read_record(path: pathlib.Path) -> ShardRecord:
    """Return the recorded size and hash of a complete shard."""
    try:
        return read_json(path, ShardRecord)
    except InputError:
        raise InputError(f'{path}: damaged. Delete it and run the writer again: it writes this shard anew.') from None


def _difference(key: str, old: Any, new: Any) -> str:
    """Return '{key} = {old}, not {new}'; for mappings, of the first item that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        key, old, new = next((f'{key}.{k}', old.get(k), new.get(k)) for k in {**old, **new} if old.get(k) != new.get(k))
    return f'{key} = {old}, not {new}'
