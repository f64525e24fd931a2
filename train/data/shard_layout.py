"""File names of a sample set, and the samples of each shard."""

from __future__ import annotations

import dataclasses
import math
import pathlib

SPLIT = 'train'
# Folder of the records of complete shards.
RECORDS = 'shards'


@dataclasses.dataclass(frozen=True)
class ShardLayout:
    """Assignment of a set's samples to the files of its folder.

    Attributes:
      name: dataset name in TFDS, the beginning of every shard's file name.
      count: samples of the whole set.
    """

    folder: pathlib.Path
    name: str
    count: int
    samples_per_shard: int

    @property
    def shards(self) -> range:
        """Numbers of all shards."""
        return range(math.ceil(self.count / self.samples_per_shard))

    def samples(self, shard: int) -> range:
        """Return the indices of a shard's samples."""
        size = self.samples_per_shard
        return range(shard * size, min((shard + 1) * size, self.count))

    def shard_path(self, shard: int) -> pathlib.Path:
        """Return the ArrayRecord file, named as TFDS expects it."""
        return self.folder / f'{self.name}-{SPLIT}.array_record-{shard:05d}-of-{len(self.shards):05d}'

    def record_path(self, shard: int) -> pathlib.Path:
        """Return the file with a complete shard's size and hash; it exists once the shard is complete."""
        return self.folder / RECORDS / f'{shard:05d}.json'

    def journal_path(self, shard: int) -> pathlib.Path:
        """Return the journal of a shard that is being written."""
        return self.folder / f'.journal-{shard:05d}'

    def partial_path(self, shard: int) -> pathlib.Path:
        """Return the ArrayRecord file before it is complete."""
        return self.folder / f'.partial-{shard:05d}'
