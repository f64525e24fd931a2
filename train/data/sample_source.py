"""Reading a sample set: a complete folder of a `SampleWriter`."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from neodragon_jax.base.atomic import PathLike
from neodragon_jax.base.errors import InputError
from train.data.manifest import NEGATIVE, NULL, SPLIT, check_shard, read_manifest
from train.data.record_spec import INDEX, RecordSpec


class SampleSource:
    """A complete folder of a SampleWriter as a `Source`.

    A sample holds the arrays of its spec, its texts as str, its blobs as bytes, and `index` (int). Of teacher samples
    these are latents [T, H, W, C], text [L, D], text_mask [L], pooled [P] and prompt.

    Attributes:
      spec: names, shapes and types.
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
        manifest = read_manifest(self._folder)
        if not manifest['complete']:
            raise InputError(f'{self._folder}: not all samples are written; run its writer again to complete it.')
        for shard in manifest['shards']:
            check_shard(self._folder / shard['file'], shard, verify)
        for name in ('dataset_info.json', 'features.json'):
            if not (self._folder / name).is_file():
                raise InputError(f'{self._folder}: {name} is missing. Copy the folder again.')
        self.spec = RecordSpec.from_json(manifest['spec'])
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
        texts = {name: sample[name].decode() for name in self.spec.texts}
        return sample | texts | {INDEX: int(sample[INDEX])}

    def negative(self) -> dict[str, np.ndarray]:
        """Return the conditioning that guidance steers away from: of states text [L, D], text_mask [L], pooled [P].

        Raises:
          InputError: the folder has none.
        """
        return self._conditioning(NEGATIVE)

    def null(self) -> dict[str, np.ndarray]:
        """Return the conditioning of the empty prompt, which takes the place of dropped captions.

        Raises:
          InputError: the folder has none.
        """
        return self._conditioning(NULL)

    def _conditioning(self, kind: str) -> dict[str, np.ndarray]:
        path = self._folder / f'{kind}.npz'
        if not path.is_file():
            raise InputError(f'{self._folder}: no {path.name} in it; write it with SampleWriter.write_conditioning.')
        with np.load(path) as arrays:
            return {name: self.spec.conform(name, arrays[name], str(path)) for name in arrays.files}
