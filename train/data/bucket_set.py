"""Sample sets that are written into a bucket: journals on local disk, complete shards in the bucket.

A shard grows by small appends, which a bucket does not allow. It is therefore written in the user's cache folder and
uploaded when complete, followed by its record. A process that starts again on the same machine continues its journal;
on another machine it begins the unfinished shard anew.
"""

from __future__ import annotations

import os
import pathlib

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.bucket import SCHEME, StoragePath, check_bucket, filesystem, stage_folder, upload
from train.data.manifest import MANIFEST
from train.data.shard_layout import RECORDS, ShardLayout
from train.data.stored_conditioning import KINDS, conditioning_path


class BucketSet:
    """Local folder of a sample set, and its complete files in a bucket.

    Attributes:
      local: folder that the set is written in.
    """

    def __init__(self, folder: StoragePath) -> None:
        """Begin with the manifest and the records that are in the bucket.

        Raises:
          InputError: the bucket does not exist, or may not be written.
        """
        check_bucket(folder, '--out', write=True)
        self._folder = folder
        self.local = stage_folder().with_name('written') / os.fspath(folder).removeprefix(SCHEME)
        self.local.mkdir(parents=True, exist_ok=True)
        self.pull()

    def pull(self) -> None:
        """Copy the small files: manifest, conditionings, and the records of the shards of other processes."""
        for name in (MANIFEST, RECORDS, *(conditioning_path(self.local, kind).name for kind in KINDS)):
            for path in filesystem().find(os.fspath(self._folder / name)):
                target = self.local / path.removeprefix(os.fspath(self._folder).removeprefix(SCHEME) + '/')
                with atomic_file(target) as draft:
                    filesystem().get_file(path, str(draft))

    def resume(self, layout: ShardLayout) -> None:
        """Upload the shards that an earlier writer has completed and not uploaded; forget those that are gone."""
        for shard in layout.shards:
            self.push_shard(layout, shard)
        there = {path.rpartition('/')[2] for path in filesystem().find(os.fspath(self._folder / RECORDS))}
        for path in (layout.record_path(shard) for shard in layout.shards):
            if path.exists() and path.name not in there:
                # The set was deleted from the bucket: its samples are gone.
                path.unlink()

    def push_shard(self, layout: ShardLayout, shard: int) -> None:
        """Upload a shard if it is complete and still on local disk, before its record, and delete it here."""
        if layout.record_path(shard).exists() and layout.shard_path(shard).exists():
            self.push(layout.shard_path(shard))
            self.push(layout.record_path(shard))
            layout.shard_path(shard).unlink()

    def push(self, *paths: pathlib.Path) -> None:
        """Upload files of the local folder."""
        upload({os.fspath(self._folder / path.relative_to(self.local).as_posix()): path for path in paths})
