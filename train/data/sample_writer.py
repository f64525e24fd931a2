"""Writing a dataset: resumable after any interruption, because making the samples may take days.

A shard in the making is a journal of finished samples. When it is full it becomes an ArrayRecord file under its final
name, then its size and hash are recorded, then the journal goes. A process killed between any two of these steps, or
within one, leaves what the next process needs to go on after the last finished sample.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from neodragon_jax.base.atomic import PathLike, atomic_file
from neodragon_jax.base.errors import InputError
from train.data.journal import Journal, count_records
from train.data.manifest import FORMAT, MANIFEST, NEGATIVE, SPLIT, read_manifest, write_json
from train.data.record_spec import INDEX, RecordSpec

# One record per group is what random access reads fastest; latents are noise to a compressor.
RECORD_OPTIONS = 'group_size:1,uncompressed'


class SampleWriter:
    """Writes samples in shards; a new writer on the same folder goes on after the last finished sample.

        with SampleWriter(folder, spec, count, protocol={...}) as writer:
            for index in writer.missing():
                writer.append({'index': index, 'prompt': ..., 'latents': ..., 'text': ..., ...})

    Several processes write together when each takes its own `part`. The last one to finish makes the dataset whole:
    TFDS metadata, and the manifest with the size and the SHA-256 of every shard.
    """

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
        """Begin or continue a dataset.

        Args:
          folder: made if absent.
          count: samples in the whole dataset.
          protocol: JSON on how the samples come about: the same for every writer, and part of the manifest.
          part, parts: this writer's share of the shards.
          name: dataset name in TFDS.
        Raises:
          InputError: the folder holds a dataset with another plan, or another process is writing this part.
        """
        if count < 1 or samples_per_shard < 1 or not 0 <= part < parts:
            raise InputError(
                f'SampleWriter: count={count}, samples_per_shard={samples_per_shard}, part={part} of {parts}; '
                'the first two are positive and part is in 0..parts-1.'
            )
        self._folder, self._spec, self._part, self._parts = pathlib.Path(folder), spec, part, parts
        self._plan = json.loads(
            json.dumps(
                {
                    'format': FORMAT,
                    'name': name,
                    'count': count,
                    'samples_per_shard': samples_per_shard,
                    'spec': spec.to_json(),
                    'protocol': dict(protocol),
                }
            )
        )
        self._features = spec.features()
        self._begin()
        self._todo = [index for shard in self._own_shards() for index in self._recover(shard)]
        self._position = 0
        self._journal: Journal | None = None

    def _begin(self) -> None:
        """Write the plan, or check that the folder was begun with the same one."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f'{self._folder} is or lies under a file; choose another folder.') from None
        if not (self._folder / MANIFEST).exists():
            write_json(self._folder / MANIFEST, self._plan | {'complete': False, 'shards': []}, self._part)
            return
        manifest = read_manifest(self._folder)
        for key, value in self._plan.items():
            if manifest.get(key) != value:
                raise InputError(
                    f'{self._folder}: was begun with {_difference(key, manifest.get(key), value)}; choose another '
                    'folder, or continue with the same settings.'
                )

    def _shards(self) -> range:
        return range(math.ceil(self._plan['count'] / self._plan['samples_per_shard']))

    def _own_shards(self) -> range:
        return self._shards()[self._part :: self._parts]

    def _indices(self, shard: int) -> range:
        size = self._plan['samples_per_shard']
        return range(shard * size, min((shard + 1) * size, self._plan['count']))

    def _recover(self, shard: int) -> range:
        """Return the samples that a shard still needs, after taking the steps that a killed process did not."""
        if self._record_path(shard).exists():
            self._journal_path(shard).unlink(missing_ok=True)
            return range(0)
        finished = count_records(self._journal_path(shard))
        if finished == len(self._indices(shard)):
            with Journal(self._journal_path(shard)) as journal:
                self._complete(shard, journal)
        return self._indices(shard)[finished:]

    def _record_path(self, shard: int) -> pathlib.Path:
        """Return the file that tells that a shard is complete: its size and hash."""
        return self._folder / 'shards' / f'{shard:05d}.json'

    def _journal_path(self, shard: int) -> pathlib.Path:
        return self._folder / f'.journal-{shard:05d}'

    def _template(self) -> tfds.core.ShardedFileTemplate:
        return tfds.core.ShardedFileTemplate(
            data_dir=os.fspath(self._folder),  # pyright: ignore[reportArgumentType]
            dataset_name=self._plan['name'],
            split=SPLIT,
            filetype_suffix='array_record',
        )

    def missing(self) -> list[int]:
        """Return the indices that this part must still write, in the order in which to append them."""
        return self._todo[self._position :]

    def append(self, sample: Mapping[str, Any]) -> None:
        """Add the next missing sample; floating-point arrays are rounded to the stored type.

        Raises:
          InputError: it is not the next one, or something in it does not fit the spec.
        """
        index, where = int(sample[INDEX]), f'{self._folder}: sample {sample[INDEX]}'
        if self._position == len(self._todo) or index != self._todo[self._position]:
            expected = self._todo[self._position] if self._position < len(self._todo) else 'none: all are written'
            raise InputError(f'{where} is out of order; append the indices of missing() in turn (next: {expected}).')
        absent = [name for name in self._spec.names() if name not in sample]
        if absent:
            raise InputError(f'{where} has no {", ".join(absent)}; pass all that the dataset holds.')
        values = {name: self._spec.conform(name, sample[name], where) for name in self._spec.names()}
        shard = index // self._plan['samples_per_shard']
        if self._journal is None:
            self._journal = self._open(shard, index)
        self._journal.append(self._features.serialize_example(values | {INDEX: index}))
        self._position += 1
        if index == self._indices(shard)[-1]:
            self._complete(shard, self._journal)
            self._journal = None

    def _open(self, shard: int, index: int) -> Journal:
        """Return the journal of a shard, which goes on with a sample."""
        journal = Journal(self._journal_path(shard))
        if journal.count != index - self._indices(shard)[0] or self._record_path(shard).exists():
            journal.close()
            raise InputError(f'{self._folder}: another process has written part {self._part} meanwhile; start one.')
        return journal

    def _complete(self, shard: int, journal: Journal) -> None:
        """Turn a full journal into the shard's file, then record its size and hash, then remove the journal."""
        partial = self._folder / f'.partial-{shard:05d}'
        writer = ArrayRecordWriter(str(partial), RECORD_OPTIONS)
        for record in journal:
            writer.write(record)
        writer.close()
        with partial.open('r+b') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
            os.fsync(file.fileno())  # else, after a power failure, the name may be there without the content
        path = pathlib.Path(self._template().sharded_filepath(shard_index=shard, num_shards=len(self._shards())))
        size = partial.stat().st_size
        os.replace(partial, path)
        self._record_path(shard).parent.mkdir(exist_ok=True)
        record = {'file': path.name, 'count': len(self._indices(shard)), 'bytes': size, 'sha256': digest}
        write_json(self._record_path(shard), record, self._part)
        journal.remove()

    def write_negative(self, text: np.ndarray, text_mask: np.ndarray, pooled: np.ndarray) -> None:
        """Store the conditioning that guidance steers away from, once beside the samples."""
        self.write_conditioning(NEGATIVE, {'text': text, 'text_mask': text_mask, 'pooled': pooled})

    def write_conditioning(self, kind: str, arrays: Mapping[str, Any]) -> None:
        """Store the conditioning of one prompt beside the samples: some arrays of their spec.

        Args:
          kind: its name, such as NEGATIVE or NULL.
        """
        where = f'{self._folder}: {kind} conditioning'
        stored = {name: self._spec.conform(name, value, where) for name, value in arrays.items()}
        # NumPy files know no bfloat16; every bfloat16 is a float32.
        wide = {name: array.astype(np.float32) if array.dtype.kind == 'V' else array for name, array in stored.items()}
        with atomic_file(self._folder / f'{kind}.npz') as path, path.open('wb') as file:
            np.savez(file, **wide)

    def close(self) -> bool:
        """Keep what is written; return whether the whole dataset is complete, which makes it readable."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if not all(self._record_path(shard).exists() for shard in self._shards()):
            return False
        shards = [json.loads(self._record_path(shard).read_text()) for shard in self._shards()]
        self._write_tfds_metadata(shards)
        write_json(self._folder / MANIFEST, self._plan | {'complete': True, 'shards': shards}, self._part)
        return True

    def _write_tfds_metadata(self, shards: list[dict[str, Any]]) -> None:
        """Write dataset_info.json and features.json, so that `tfds.builder_from_directory` reads the folder."""
        identity = DatasetIdentity(
            name=self._plan['name'], version=tfds.core.Version('1.0.0'), data_dir=str(self._folder), module_name=''
        )
        description = f'{", ".join(self._spec.names())}; {MANIFEST} tells how they came about.'
        info = tfds.core.DatasetInfo(builder=identity, features=self._features, description=description)
        info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
        split = tfds.core.SplitInfo(
            name=SPLIT,
            shard_lengths=[shard['count'] for shard in shards],
            num_bytes=sum(shard['bytes'] for shard in shards),
            filename_template=self._template(),
        )
        info.set_splits(tfds.core.SplitDict([split]))
        staging = self._folder / f'.partial-{self._part}-metadata'
        staging.mkdir(exist_ok=True)
        info.write_to_directory(staging)
        for file in staging.iterdir():
            os.replace(file, self._folder / file.name)
        staging.rmdir()

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _difference(key: str, old: Any, new: Any) -> str:
    """Return '{key} = {old}, not {new}', of mappings only what differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        key, old, new = next((f'{key}.{k}', old.get(k), new.get(k)) for k in {**old, **new} if old.get(k) != new.get(k))
    return f'{key} = {old}, not {new}'
