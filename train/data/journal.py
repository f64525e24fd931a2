"""An append-only file of records that survives kills: each record follows its length and checksum.

Appended records survive any end of the process; the next process truncates an incomplete record.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pathlib
import struct
from collections.abc import Iterator
from typing import BinaryIO, Self

from neodragon_jax.base.errors import InputError

HEADER = struct.Struct('<Q16s')  # length in bytes, checksum


def checksum(record: bytes) -> bytes:
    """Return a checksum of 16 bytes."""
    return hashlib.blake2b(record, digest_size=16).digest()


def records(file: BinaryIO) -> Iterator[bytes]:
    """Yield the whole records from the start of a file up to the first that is torn or damaged."""
    file.seek(0)
    size = os.fstat(file.fileno()).st_size
    while len(header := file.read(HEADER.size)) == HEADER.size:
        length, digest = HEADER.unpack(header)
        # A damaged length must not cause an allocation larger than the file.
        record = file.read(min(length, size))
        if len(record) != length or checksum(record) != digest:
            return
        yield record


def count_records(path: pathlib.Path) -> int:
    """Return the number of whole records of a journal; 0 if the file does not exist."""
    if not path.exists():
        return 0
    with path.open('rb') as file:
        return sum(1 for _ in records(file))


class Journal:
    """A journal open for appending, by one process at a time.

    Attributes:
      count: records in it.
    """

    def __init__(self, path: pathlib.Path) -> None:
        """Open or make a journal, and cut off a half-written record.

        Raises:
          InputError: another process has it open.
        """
        self.path = path
        self._file = path.open('a+b')
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system unlocks it when the process ends
        except BlockingIOError:
            self._file.close()
            raise InputError(f'{path}: another process is writing it; stop that one, or wait for it.') from None
        self.count, end = 0, 0
        for record in records(self._file):
            self.count, end = self.count + 1, end + HEADER.size + len(record)
        self._file.truncate(end)

    def append(self, record: bytes) -> None:
        """Add a record; once this returns, the record survives a kill of the process."""
        self._file.write(HEADER.pack(len(record), checksum(record)) + record)
        self._file.flush()
        self.count += 1

    def __iter__(self) -> Iterator[bytes]:
        return records(self._file)

    def remove(self) -> None:
        """Delete the journal."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
