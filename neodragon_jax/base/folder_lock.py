"""Locks on output folders: two processes never write to the same folder.

A lock is a small file in the folder that names its owner. The owner holds a POSIX record lock on it, which the kernel
releases however the process ends. The lock file of a killed process is therefore recognized and taken over. Other hosts
may not see record locks, so the owner also renews the time of the file; a lock of another host expires without that.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from neodragon_jax.base import bucket
from neodragon_jax.base.atomic import LOCK_PREFIX, PathLike, is_alive, made_folder
from neodragon_jax.base.bucket_lock import EXPIRES_S, RENEW_S, BucketLock, lock_fields
from neodragon_jax.base.errors import InputError

# Seconds in which the lock of a vanished host expires, with a margin.
UNTIL_EXPIRED_S = EXPIRES_S + 15.0
_POLL_S = 1.0
# Locks that this process holds: record locks do not exclude each other within one process.
_HELD: set[pathlib.Path] = set()

T = TypeVar('T')


class _InUseError(InputError):
    """Error of a folder that another process may be writing into.

    Attributes:
      elsewhere: whether that process is on another host, and may have vanished with it.
    """

    def __init__(self, message: str, elsewhere: bool) -> None:
        super().__init__(message)
        self.elsewhere = elsewhere


@contextlib.contextmanager
def folder_lock(folder: PathLike, part: str = '') -> Iterator[None]:
    """Hold the lock of an output folder while the block runs.

    A process of another host may have vanished, as where a preempted job restarts elsewhere: this one says so, waits up
    to UNTIL_EXPIRED_S until the lock expires or is released, and only then refuses.

    Args:
      folder: made if absent; removed again if it is then empty.
      part: name of the part of the folder that this process writes; each part has a lock of its own. Several processes
        of one run, each writing its own shards, give their numbers.
    Raises:
      InputError: the folder is a file, or another process has the lock.
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
        descriptor, end = _waiting(lambda: _acquire(folder, path)), threading.Event()
        renewal = threading.Thread(target=_renew, args=(path, descriptor, end), name='folder lock', daemon=True)
        renewal.start()
        _HELD.add(path)
        try:
            yield
        finally:
            end.set()
            renewal.join()
            _HELD.discard(path)
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _waiting(acquire: Callable[[], T]) -> T:
    """Return the result of a function, which is called again for some seconds while another host has the lock."""
    deadline, told = time.monotonic() + UNTIL_EXPIRED_S, False
    while True:
        try:
            return acquire()
        except _InUseError as error:
            if not error.elsewhere or time.monotonic() >= deadline:
                raise
            if not told:
                print(f'{error} This process waits up to {UNTIL_EXPIRED_S:.0f} s.', file=sys.stderr, flush=True)
            told = True
            time.sleep(_POLL_S)


@contextlib.contextmanager
def _bucket_lock(folder: str, name: str) -> Iterator[None]:
    """Hold the lock of a folder of a bucket."""

    def acquire() -> BucketLock:
        lock = BucketLock(f'{folder}/{name}', _owner() | {'life': uuid.uuid4().hex})
        owner = lock.acquire(_has_ended)
        if owner is not None:
            raise _in_use(folder, owner)
        return lock

    lock = _waiting(acquire)
    try:
        yield
    finally:
        lock.release()


def _in_use(folder: PathLike, owner: Mapping[str, str]) -> _InUseError:
    """Return the error of a folder that another process may be writing into."""
    return _InUseError(
        f'{folder}: {_shown(owner)} is writing into it. Wait for it, stop it, or give another folder; the lock of a '
        f'machine that has vanished expires after {EXPIRES_S:.0f} s.',
        elsewhere=_is_elsewhere(owner),
    )


def _is_elsewhere(owner: Mapping[str, str]) -> bool:
    """Return whether the owner of a lock is on another host."""
    return owner.get('host', '') not in ('', socket.gethostname())


def _acquire(folder: pathlib.Path, path: pathlib.Path) -> int:
    """Return the descriptor of the locked file, which names this process."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with contextlib.ExitStack() as failed:
            failed.callback(os.close, descriptor)
            _lock(descriptor, folder)
            # The last owner may have removed the file after it was opened here and before it was locked.
            if _is_open_file(path, descriptor):
                failed.callback(path.unlink)
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_owner()).encode(), 0)
                failed.pop_all()
                return descriptor


def _is_open_file(path: pathlib.Path, descriptor: int) -> bool:
    """Return whether a path is still that of an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int, folder: pathlib.Path) -> None:
    """Lock an open file, or raise InputError that names the owner."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise _in_use(folder, lock_fields(os.pread(descriptor, 4096, 0))) from None
    content = os.pread(descriptor, 4096, 0)
    owner, age_s = lock_fields(content), time.time() - os.fstat(descriptor).st_mtime
    # File systems of several hosts do not all share record locks, so an owner elsewhere may be alive.
    if content and _is_elsewhere(owner) and age_s < EXPIRES_S:
        raise _in_use(folder, owner)


def _renew(path: pathlib.Path, descriptor: int, end: threading.Event) -> None:
    """Renew the time of a lock file; end the process if another one has replaced the file."""
    while not end.wait(RENEW_S):
        with contextlib.suppress(OSError):  # a network disk that does not answer; the next renewal may succeed
            os.utime(descriptor)
            if not _is_open_file(path, descriptor):
                print(f'error: {path}: another process has taken over the folder; stopping.', file=sys.stderr)
                os._exit(1)


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
