"""Locks on folders of a bucket: an object that a process writes only over the generation that it has read.

Cloud Storage compares the generation and writes as one operation, so two processes never both get the lock. The owner
writes the object again while it runs. The lock of a preempted machine therefore expires, and the next process takes it
over.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from neodragon_jax.base.bucket import SCHEME, filesystem
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import parse_json

# Seconds between two renewals, and seconds without one after which the owner has ended.
RENEW_S, EXPIRES_S = 20.0, 90.0
# Generation of an object that does not exist.
ABSENT = '0'
_BOUNDARY = 'part-of-the-upload'


class BucketLock:
    """The lock of a folder of a bucket, held from `acquire` to `release`."""

    def __init__(self, path: str, owner: Mapping[str, Any]) -> None:
        """Store the arguments.

        Args:
          path: gs:// path of the lock's object.
          owner: JSON that describes this process, different from that of any other.
        """
        self._bucket, _, self._name = path.removeprefix(SCHEME).partition('/')
        self._path, self._owner = path, {name: str(value) for name, value in owner.items()}
        self._generation, self._end = ABSENT, threading.Event()
        self._thread = threading.Thread(target=self._renew, name='bucket lock', daemon=True)

    def acquire(self, has_ended: Callable[[Mapping[str, str]], bool]) -> Mapping[str, str] | None:
        """Take the lock and renew it from now on; return None, or the owner if it has one.

        Args:
          has_ended: whether the process of an owner is known to have ended.
        """
        found, owner, age_s = self._read()
        if found != ABSENT and age_s < EXPIRES_S and not has_ended(owner):
            return owner
        if not self._write(found):
            return self._read()[1] or {}
        self._thread.start()
        return None

    def release(self) -> None:
        """Stop the renewal and remove the object."""
        self._end.set()
        self._thread.join()
        with contextlib.suppress(FileNotFoundError):
            filesystem().call('DELETE', 'b/{}/o/{}', self._bucket, self._name, ifGenerationMatch=self._generation)

    def _read(self) -> tuple[str, Mapping[str, str], float]:
        """Return the generation of the object, its owner, and the seconds since it was written."""
        try:
            info = filesystem().info(self._path)
            owner = lock_fields(filesystem().cat_file(self._path))
        except FileNotFoundError:
            return ABSENT, {}, 0.0
        return str(info['generation']), owner, time.time() - info['mtime'].timestamp()

    def _write(self, over: str) -> bool:
        """Write the object if its generation is `over`; return whether it was."""
        parts = (('application/json; charset=UTF-8', {'name': self._name}), ('application/json', self._owner))
        body = ''.join(f'--{_BOUNDARY}\r\nContent-Type: {kind}\r\n\r\n{json.dumps(part)}\r\n' for kind, part in parts)
        address = filesystem().base.replace('/storage/', '/upload/storage/') + 'b/{}/o'
        try:
            made = filesystem().call(
                'POST',
                address,
                self._bucket,
                uploadType='multipart',
                ifGenerationMatch=over,
                headers={'Content-Type': f'multipart/related; boundary={_BOUNDARY}'},
                data=f'{body}--{_BOUNDARY}--',
                json_out=True,
            )
        except FileExistsError:
            # The answer to an upload may be lost; the repeated upload then finds its own object.
            found, owner, _ = self._read()
            if owner != self._owner:
                return False
            self._generation = found
        else:
            self._generation = str(made['generation'])
        return True

    def _renew(self) -> None:
        while not self._end.wait(RENEW_S):
            try:
                if self._write(self._generation):
                    continue
            except Exception as error:  # a lost connection; the next renewal may succeed
                print(f'{self._path}: the lock could not be renewed ({error})', file=sys.stderr)
                continue
            print(f'error: {self._path}: another process has taken over the folder; stopping.', file=sys.stderr)
            os._exit(1)


def lock_fields(content: bytes) -> dict[str, str]:
    """Return the fields of a lock; none if it is damaged."""
    try:
        fields = parse_json(content, dict[str, Any], 'lock')
    except InputError:
        return {}
    return {key: str(value) for key, value in fields.items()}
