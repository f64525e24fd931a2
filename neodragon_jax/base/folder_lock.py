"""Locks on output folders: two processes never write to the same folder.

A lock is a small file in the folder that names its owner. The owner holds a POSIX record lock on it, which the kernel
releases however the process ends. The lock file of a killed process is therefore recognized and taken over.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from neodragon_jax.base import bucket
from neodragon_jax.base.atomic import LOCK_PREFIX, PathLike, is_alive, made_folder
from neodragon_jax.base.bucket_lock import EXPIRES_S, BucketLock, lock_fields
from neodragon_jax.base.errors import InputError

# Locks that this process holds: record locks do not exclude each other within one process.
_HELD: set[pathlib.Path] = set()


@contextlib.contextmanager
def folder_lock(folder: PathLike, part: str = '') -> Iterator[None]:
    """Hold the lock of an output folder while the block runs.

    Args:
      folder: made if absent; removed again if it is then empty.
      part: name of the part of the folder that this process writes; each part has a lock of its own. Several processes
        of one run, each writing its own shards, give their numbers.
    Raises:
      InputError: the folder is a file, another process has the lock, or a process of another host left one.
    """
    name = f'{LOCK_PREFIX}-{part}' if part else LOCK_PREFIX
    if bucket.is_bucket(folder):
        with _bucket_lock(os.fspath(folder), name):
            yield
        return
    folder = pathlib.Path(folder).resolve()
    path = folder / name
    if path in _HELD:
        raise InputError(f'{folder}: this process writes into it already; give another folder.')
    with made_folder(folder):
        descriptor = _acquire(folder, path)
        _HELD.add(path)
        try:
            yield
        finally:
            _HELD.discard(path)
            path.unlink(missing_ok=True)
            os.close(descriptor)


@contextlib.contextmanager
def _bucket_lock(folder: str, name: str) -> Iterator[None]:
    """Hold the lock of a folder of a bucket."""
    lock = BucketLock(f'{folder}/{name}', _owner() | {'life': uuid.uuid4().hex})
    owner = lock.acquire(_has_ended)
    if owner is not None:
        raise InputError(
            f'{folder}: {_shown(owner)} is writing into it. Wait for it, stop it, or give another folder; the '
            f'lock of a machine that has vanished expires after {EXPIRES_S:.0f} s.'
        )
    try:
        yield
    finally:
        lock.release()


def _acquire(folder: pathlib.Path, path: pathlib.Path) -> int:
    """Return the descriptor of the locked file, which names this process."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.ExitStack() as failed:
            failed.callback(os.close, descriptor)
            _lock(descriptor, folder, path)
            # The last owner may have removed the file after it was opened here and before it was locked.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                failed.callback(path.unlink)
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_owner()).encode(), 0)
                failed.pop_all()
                return descriptor


def _lock(descriptor: int, folder: pathlib.Path, path: pathlib.Path) -> None:
    """Lock an open file, or raise InputError that names the owner."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        text = _shown(lock_fields(os.pread(descriptor, 4096, 0)))
        raise InputError(
            f'{folder}: {text} is writing into it. Wait for it, stop it, or give another folder.'
        ) from None
    content = os.pread(descriptor, 4096, 0)
    # File systems of several hosts do not all share record locks, so an owner elsewhere may be alive.
    if content and lock_fields(content).get('host', '') not in ('', socket.gethostname()):
        owner = _shown(lock_fields(content))
        raise InputError(f'{folder}: {owner} left its lock. If that process has ended, remove {path} and start again.')


def _owner() -> dict[str, Any]:
    """Return the description of this process in a lock."""
    started = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
    return {'host': socket.gethostname(), 'pid': os.getpid(), 'started': started}


def _has_ended(owner: Mapping[str, str]) -> bool:
    """Return whether the owner of a lock was a process of this machine that has ended."""
    pid = owner.get('pid', '')
    return owner.get('host') == socket.gethostname() and pid.isdigit() and not is_alive(int(pid))


def _shown(fields: Mapping[str, str]) -> str:
    """Return the owner of a lock in words."""
    if not {'host', 'pid', 'started'} <= set(fields):
        return 'another process'
    return f'process {fields["pid"]} on {fields["host"]}, since {fields["started"]},'
