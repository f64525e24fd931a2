"""Reading a sample set: a complete folder of a `SampleWriter`."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from neodragon_jax.base.atomic import PathLike
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.paths import input_path
from train.data.manifest import check_shard, read_manifest
from train.data.record_spec import INDEX
from train.data.shards import read_record
from train.data.sources import joint_identity
from train.data.stored_conditioning import NEGATIVE, NULL, read_conditioning
from train.data.tfds_metadata import METADATA

# A set of at most this size is verified whenever it is opened.
VERIFIED_BYTES = 2**26


class SampleSource:
    """A complete sample set as a `Source`.

    A sample holds the arrays of its spec, its texts as str, its blobs as bytes, and `index` (int). Of teacher samples
    these are latents [T, H, W, C], text [L, D], text_mask [L], pooled [P] and prompt.

    The features are built from the manifest; names of classes in features.json, which only TFDS reads, are ignored.

    Attributes:
      spec: names, shapes and types.
      protocol: the settings that the samples depend on, as given to the writer.
    """

    def __init__(self, folder: PathLike, *, verify: bool = False) -> None:
        """Open and check a folder.

        Args:
          folder: local, or in a bucket, from where it is copied to the user's cache first.
          verify: compare the SHA-256 of every shard also of a large set, which reads all of it. Sizes are compared
            always, and so is the place of every sample that is read.
        Raises:
          InputError: the folder, its manifest or a shard is missing, incomplete or damaged.
        """
        folder = input_path(folder, 'sample set')
        self._folder = folder.absolute()
        self._manifest = manifest = read_manifest(folder)
        if not manifest.complete:
            raise InputError(f'{folder}: not all samples are written; run its writer again to complete it.')
        verify = verify or sum(shard.bytes for shard in manifest.shards) <= VERIFIED_BYTES
        for shard in manifest.shards:
            check_shard(pathlib.Path(folder, shard.file), shard, verify)
        for name in METADATA:
            if not (self._folder / name).is_file():
                raise InputError(f'{folder}: {name} is missing. Copy the folder again.')
        self.spec, self.protocol = manifest.spec, manifest.protocol
        self._features = manifest.spec.features()

    def __len__(self) -> int:
        return self._manifest.layout.count

    @property
    def identity(self) -> str:
        """Hash of the content of all samples, see `train.data.sources.identity`."""
        return joint_identity(*(shard.sha256 for shard in self._manifest.shards))

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, place = divmod(int(index), self._manifest.layout.samples_per_shard)
        shard = self._manifest.shards[number]
        path = self._folder / shard.file
        record = read_record(path, shard, place)
        try:
            decoded: Any = self._features.deserialize_example_np(record)
            sample = dict(decoded) | {name: decoded[name].decode() for name in self.spec.texts}
        except Exception as error:  # TFDS documents no exception type for bytes of another spec
            raise InputError(
                f'{path}: sample {index} does not match the manifest ({type(error).__name__}). Copy the folder again.'
            ) from None
        if sample[INDEX] != index:
            raise InputError(f'{path}: holds sample {sample[INDEX]} in the place of {index}. Copy the files again.')
        return sample | {INDEX: int(index)}

    def negative(self) -> dict[str, np.ndarray]:
        """Return the conditioning of the negative prompt; for states: text [L, D], text_mask [L], pooled [P].

        Raises:
          InputError: the set has none, or it is damaged.
        """
        return read_conditioning(self._manifest, NEGATIVE)

    def null(self) -> dict[str, np.ndarray]:
        """Return the conditioning of the empty prompt, which replaces dropped captions.

        Raises:
          InputError: the set has none, or it is damaged.
        """
        return read_conditioning(self._manifest, NULL)
