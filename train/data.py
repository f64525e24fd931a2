"""Teacher samples on disk: a TFDS dataset of ArrayRecord files, written and read without TensorFlow.

A program trains on any `Source`; `SampleSource` is the one on disk. Writing is resumable, because generating the
samples takes days: each shard is complete or absent, and a manifest tells what the files must be.

Legend: T latent frames, H W latent grid, C channels, L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from neodragon_jax.atomic import PathLike, atomic_file
from neodragon_jax.errors import InputError

FORMAT = 1
SPLIT = 'train'
MANIFEST, NEGATIVE = 'manifest.json', 'negative.npz'
# One record per group is what random access reads fastest; latents are noise to a compressor.
RECORD_OPTIONS = 'group_size:1,uncompressed'
DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}


class Source(Protocol):
    """Random access to samples whose arrays have equal shapes. Text stays on the host: batches omit it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """Shapes and types of one teacher sample.

    Attributes:
      latents: [T, H, W, C] of the whole video.
      text: [L, D] of the prompt states; the mask has L numbers.
      pooled: P.
      latents_dtype, text_dtype: 'float32' or 'bfloat16'; `text_dtype` holds for the pooled vector, too.
    """

    latents: tuple[int, int, int, int]
    text: tuple[int, int]
    pooled: int
    latents_dtype: str = 'bfloat16'
    text_dtype: str = 'float32'

    def __post_init__(self) -> None:
        for name in ('latents_dtype', 'text_dtype'):
            if getattr(self, name) not in DTYPES:
                raise InputError(f'SampleSpec.{name} is {getattr(self, name)!r}; use one of {", ".join(DTYPES)}.')

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Return (shape, type) of every array of a sample."""
        text_dtype = DTYPES[self.text_dtype]
        return {
            'latents': (tuple(self.latents), DTYPES[self.latents_dtype]),
            'text': (tuple(self.text), text_dtype),
            'text_mask': (tuple(self.text[:1]), np.dtype(np.int32)),
            'pooled': ((self.pooled,), text_dtype),
        }

    def features(self) -> tfds.features.FeaturesDict:
        """Return the TFDS features; raw bytes need no TensorFlow and are the fastest."""
        tensors = {
            name: tfds.features.Tensor(shape=shape, dtype=dtype, encoding='bytes')  # pyright: ignore[reportArgumentType]
            for name, (shape, dtype) in self.arrays().items()
        }
        scalars = {'prompt': tfds.features.Text(), 'index': tfds.features.Scalar(np.int64)}  # pyright: ignore[reportArgumentType]
        return tfds.features.FeaturesDict(tensors | scalars)

    def conform(self, name: str, value: Any, where: str) -> np.ndarray:
        """Return an array of a sample in its stored type.

        Raises:
          InputError: its shape is another, or a number is not finite.
        """
        shape, dtype = self.arrays()[name]
        array = np.asarray(value)
        if array.shape != shape:
            raise InputError(
                f'{where}: {name} has shape {list(array.shape)}, the dataset {list(shape)}; pass that shape.'
            )
        array = array.astype(dtype)
        if not np.isfinite(array.astype(np.float32)).all():
            raise InputError(f'{where}: {name} is not finite in {dtype}; find out what the teacher did to it.')
        return array


class SampleWriter:
    """Writes teacher samples in shards; a new writer on the same folder goes on after the last complete shard.

        with SampleWriter(folder, spec, count, protocol={...}) as writer:
            for index in writer.missing():
                writer.append({'index': index, 'prompt': ..., 'latents': ..., 'text': ..., ...})

    A shard appears under its name when it is complete; samples of an incomplete shard are written again. Several
    processes write together when each takes its own `part`. The last one to finish makes the dataset whole: TFDS
    metadata, and the manifest with the size and the SHA-256 of every shard.
    """

    def __init__(
        self,
        folder: PathLike,
        spec: SampleSpec,
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
          InputError: the folder holds a dataset with another plan.
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
                    'spec': dataclasses.asdict(spec),
                    'protocol': dict(protocol),
                }
            )
        )
        self._features = spec.features()
        self._begin()
        self._todo = [index for shard in self._own_shards() for index in self._indices(shard)]
        self._position = 0
        self._writer: ArrayRecordWriter | None = None

    def _begin(self) -> None:
        """Write the plan, or check that the folder was begun with the same one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / MANIFEST).exists():
            _write_json(self._folder / MANIFEST, self._plan | {'complete': False, 'shards': []})
            return
        manifest = _read_manifest(self._folder)
        for key, value in self._plan.items():
            if manifest.get(key) != value:
                raise InputError(
                    f'{self._folder}: was begun with {key} = {manifest.get(key)}, not {value}; choose another folder, '
                    'or continue with the same settings.'
                )

    def _shards(self) -> range:
        return range(math.ceil(self._plan['count'] / self._plan['samples_per_shard']))

    def _own_shards(self) -> list[int]:
        """Return the incomplete shards of this part."""
        return [shard for shard in self._shards()[self._part :: self._parts] if not self._record_path(shard).exists()]

    def _indices(self, shard: int) -> range:
        size = self._plan['samples_per_shard']
        return range(shard * size, min((shard + 1) * size, self._plan['count']))

    def _record_path(self, shard: int) -> pathlib.Path:
        """Return the file that tells that a shard is complete: its size and hash."""
        return self._folder / 'shards' / f'{shard:05d}.json'

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
          InputError: it is not the next one, or an array has the wrong shape or is not finite.
        """
        where = f'{self._folder}: sample {sample["index"]}'
        if self._position == len(self._todo) or int(sample['index']) != self._todo[self._position]:
            expected = self._todo[self._position] if self._position < len(self._todo) else 'none: all are written'
            raise InputError(f'{where} is out of order; append the indices of missing() in turn (next: {expected}).')
        arrays = {name: self._spec.conform(name, sample[name], where) for name in self._spec.arrays()}
        record = self._features.serialize_example(
            arrays | {'prompt': str(sample['prompt']), 'index': int(sample['index'])}
        )
        shard = int(sample['index']) // self._plan['samples_per_shard']
        partial = self._folder / f'.partial-{shard:05d}'
        writer = self._writer = self._writer or ArrayRecordWriter(str(partial), RECORD_OPTIONS)
        writer.write(record)
        self._position += 1
        if int(sample['index']) == self._indices(shard)[-1]:
            self._complete(shard, partial)

    def _complete(self, shard: int, partial: pathlib.Path) -> None:
        """Give a full shard its name, then record its size and hash."""
        assert self._writer is not None
        self._writer.close()
        self._writer = None
        with partial.open('rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
        path = pathlib.Path(self._template().sharded_filepath(shard_index=shard, num_shards=len(self._shards())))
        size = partial.stat().st_size
        os.replace(partial, path)
        self._record_path(shard).parent.mkdir(exist_ok=True)
        record = {'file': path.name, 'count': len(self._indices(shard)), 'bytes': size, 'sha256': digest}
        _write_json(self._record_path(shard), record)

    def write_negative(self, text: np.ndarray, text_mask: np.ndarray, pooled: np.ndarray) -> None:
        """Store the null prompt's conditioning, which guidance needs, once beside the samples."""
        given = {'text': text, 'text_mask': text_mask, 'pooled': pooled}
        where = f'{self._folder}: negative conditioning'
        # NumPy files know no bfloat16; every bfloat16 is a float32.
        arrays = {name: self._spec.conform(name, value, where) for name, value in given.items()}
        wide = {name: arrays[name].astype(np.float32) for name in ('text', 'pooled')}
        with atomic_file(self._folder / NEGATIVE) as path, path.open('wb') as file:
            np.savez(file, text=wide['text'], text_mask=arrays['text_mask'], pooled=wide['pooled'])

    def close(self) -> bool:
        """Drop an incomplete shard; return whether the whole dataset is complete, which makes it readable."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            shard = self._todo[self._position - 1] // self._plan['samples_per_shard']
            (self._folder / f'.partial-{shard:05d}').unlink(missing_ok=True)
        if not all(self._record_path(shard).exists() for shard in self._shards()):
            return False
        shards = [json.loads(self._record_path(shard).read_text()) for shard in self._shards()]
        self._write_tfds_metadata(shards)
        _write_json(self._folder / MANIFEST, self._plan | {'complete': True, 'shards': shards})
        return True

    def _write_tfds_metadata(self, shards: list[dict[str, Any]]) -> None:
        """Write dataset_info.json and features.json, so that `tfds.builder_from_directory` reads the folder."""
        identity = DatasetIdentity(
            name=self._plan['name'], version=tfds.core.Version('1.0.0'), data_dir=str(self._folder), module_name=''
        )
        info = tfds.core.DatasetInfo(
            builder=identity,
            features=self._features,
            description='Samples of a pyramidal flow-matching teacher: latents, prompt conditioning, prompts.',
        )
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


class SampleSource:
    """A complete folder of a SampleWriter as a `Source`.

    A sample holds latents [T, H, W, C], text [L, D], text_mask [L], pooled [P], prompt (str) and index (int).

    Attributes:
      spec: shapes and types.
      protocol: how the samples came about, as given to the writer.
    """

    def __init__(self, folder: PathLike, *, verify: bool = False) -> None:
        """Open and check a folder.

        Args:
          verify: compare the SHA-256 of every shard, which reads them all; sizes are compared in any case.
        Raises:
          InputError: the folder, its manifest or a shard is missing, incomplete or damaged.
        """
        self._folder = pathlib.Path(folder)
        manifest = _read_manifest(self._folder)
        if not manifest['complete']:
            raise InputError(f'{self._folder}: not all samples are written; run its writer again to complete it.')
        for shard in manifest['shards']:
            _check_shard(self._folder / shard['file'], shard, verify)
        for name in ('dataset_info.json', 'features.json'):
            if not (self._folder / name).is_file():
                raise InputError(f'{self._folder}: {name} is missing. Copy the folder again.')
        spec = manifest['spec']
        self.spec = SampleSpec(**spec | {'latents': tuple(spec['latents']), 'text': tuple(spec['text'])})
        self.protocol: dict[str, Any] = manifest['protocol']
        builder = tfds.builder_from_directory(self._folder)
        self._records: Any = builder.as_data_source(split=SPLIT)  # pyright: ignore[reportCallIssue]
        if len(self._records) != manifest['count']:
            raise InputError(
                f'{self._folder}: {len(self._records)} samples, its manifest says {manifest["count"]}. Copy it again.'
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        sample = self._records[index]
        return sample | {'prompt': sample['prompt'].decode(), 'index': int(sample['index'])}

    def negative(self) -> dict[str, np.ndarray]:
        """Return text [L, D], text_mask [L] and pooled [P] of the null prompt.

        Raises:
          InputError: the folder has none.
        """
        path = self._folder / NEGATIVE
        if not path.is_file():
            raise InputError(f'{self._folder}: no {NEGATIVE} in it; write it with SampleWriter.write_negative.')
        with np.load(path) as arrays:
            return {name: self.spec.conform(name, arrays[name], str(path)) for name in ('text', 'text_mask', 'pooled')}


def _read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Return the manifest of a dataset folder, or say what is wrong with it."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f'{folder}: no such folder. Pass a folder that SampleWriter made.')
    if not path.is_file():
        raise InputError(f'{folder}: no {MANIFEST} in it. Pass a folder that SampleWriter made, or copy it again.')
    try:
        manifest = json.loads(path.read_text())
        version = manifest['format']
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise InputError(f'{path}: not a manifest. Copy the folder again.') from None
    if version != FORMAT:
        raise InputError(f'{path}: format {version}, this program reads format {FORMAT}. Write the samples again.')
    return manifest


def _check_shard(path: pathlib.Path, record: Mapping[str, Any], verify: bool) -> None:
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


def _write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON that appears under its name when complete."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + '\n')
