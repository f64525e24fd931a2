"""Shards of a sample set: from a full journal to an ArrayRecord file, and reading one sample of it.

A journal becomes an ArrayRecord file under its final name, then its size and hash are recorded, then the journal is
deleted. `recover` completes these steps after a process was killed between or within them.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import pathlib

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from neodragon_jax.base.errors import InputError
from train.data.journal import Journal, count_records
from train.data.manifest import ShardRecord, write_json
from train.data.shard_layout import ShardLayout

# One record per group is the fastest layout for random access; latents are noise to a compressor.
WRITE_OPTIONS = 'group_size:1,uncompressed'
READ_OPTIONS = 'readahead_buffer_size:0,max_parallelism:0'
# Open files of this process over all sample sets; the usual limit is 1,024. Reopening a file takes 0.3 ms.
OPEN_READERS = 256


def recover(layout: ShardLayout, shard: int, part: int) -> range:
    """Return the samples that a shard still needs, after completing the steps that a killed process did not.

    Args:
      part: of the writer, see `write_json`.
    """
    if layout.record_path(shard).exists():
        layout.journal_path(shard).unlink(missing_ok=True)
        return range(0)
    finished = count_records(layout.journal_path(shard))
    if finished == len(layout.samples(shard)):
        with Journal(layout.journal_path(shard)) as journal:
            complete(layout, shard, journal, part)
    return layout.samples(shard)[finished:]


def complete(layout: ShardLayout, shard: int, journal: Journal, part: int) -> None:
    """Turn a full journal into the shard's file, record its size and hash, and delete the journal.

    Raises:
      OSError: the file cannot be written; the journal is kept.
    """
    partial, path = layout.partial_path(shard), layout.shard_path(shard)
    _write(partial, journal)
    with partial.open('r+b') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
        os.fsync(file.fileno())  # otherwise the name may exist without the content after a power failure
    size = partial.stat().st_size
    os.replace(partial, path)
    layout.record_path(shard).parent.mkdir(exist_ok=True)
    record = ShardRecord(path.name, len(layout.samples(shard)), size, digest)
    write_json(layout.record_path(shard), record.to_json(), part)
    journal.remove()


def _write(path: pathlib.Path, journal: Journal) -> None:
    try:
        writer = ArrayRecordWriter(str(path), WRITE_OPTIONS)
        for record in journal:
            writer.write(record)
        writer.close()
    except RuntimeError as error:  # the library's name for every failure of the file system
        path.unlink(missing_ok=True)
        code = errno.ENOSPC if os.strerror(errno.ENOSPC) in str(error) else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from None


def read_record(path: pathlib.Path, shard: ShardRecord, place: int) -> bytes:
    """Return one record of a shard's file.

    Raises:
      InputError: the file is damaged, or has another number of records.
    """
    try:
        reader = _open(str(path), shard.sha256)
        found = reader.num_records()
        if found == shard.count:
            return reader.read([place])[0]
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0][:100]
        raise InputError(f'{path}: record {place} cannot be read ({reason}). Copy the file again.') from None
    raise InputError(f'{path}: {found} records, its manifest says {shard.count}. Copy the file again.')


@functools.lru_cache(maxsize=OPEN_READERS)
def _open(path: str, content: str) -> ArrayRecordReader:
    """Return a cached reader of a file; a reader evicted from the cache closes its file after its last use.

    Args:
      content: hash of the expected content, so that the files of a replaced set are reopened.
    """
    del content
    return ArrayRecordReader(path, READ_OPTIONS)
