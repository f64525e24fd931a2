"""The metadata that makes a complete sample set readable by `tfds.builder_from_directory`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_info import DatasetIdentity

from train.data.manifest import MANIFEST, ShardRecord
from train.data.record_spec import RecordSpec
from train.data.shard_layout import SPLIT, ShardLayout

METADATA = ('dataset_info.json', 'features.json')


def write_metadata(layout: ShardLayout, spec: RecordSpec, shards: Sequence[ShardRecord], part: int) -> None:
    """Write dataset_info.json and features.json.

    Args:
      part: of the writer; it makes the temporary name.
    """
    folder = layout.folder
    identity = DatasetIdentity(
        name=layout.name, version=tfds.core.Version('1.0.0'), data_dir=str(folder), module_name=''
    )
    description = f'{", ".join(spec.names())}; {MANIFEST} records the settings.'
    info = tfds.core.DatasetInfo(builder=identity, features=spec.features(), description=description)
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[shard.count for shard in shards],
        num_bytes=sum(shard.bytes for shard in shards),
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=os.fspath(folder),  # pyright: ignore[reportArgumentType]
            dataset_name=layout.name,
            split=SPLIT,
            filetype_suffix='array_record',
        ),
    )
    info.set_splits(tfds.core.SplitDict([split]))
    staging = folder / f'.partial-{part}-metadata'
    staging.mkdir(exist_ok=True)
    info.write_to_directory(staging)
    for file in staging.iterdir():
        os.replace(file, folder / file.name)
    staging.rmdir()
