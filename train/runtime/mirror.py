"""Local folder of a run's logs that is copied to a bucket, whose objects cannot be appended to."""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any, Self

from neodragon_jax.base.bucket import StoragePath, filesystem, is_bucket, upload

# Seconds between two copies without a request.
PERIOD_S = 60.0


class Mirror:
    """Local folder whose files are copied to a folder of a bucket every minute, on request, and at the end.

    Of a folder that is local itself nothing is copied.

    Attributes:
      local: the folder to write to.
    """

    def __init__(self, folder: StoragePath, resumed: Sequence[str] = ()) -> None:
        """Begin with the files that a previous process has left.

        Args:
          resumed: names of files to continue; other files in the bucket stay as they are.
        """
        self._folder, self._sent = folder, dict[pathlib.Path, tuple[int, int]]()
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name='mirror', daemon=True)
        if not is_bucket(folder):
            self.local = pathlib.Path(folder)
            self.local.mkdir(parents=True, exist_ok=True)
            return
        self._temporary = tempfile.TemporaryDirectory(prefix='neodragon-logs-')
        self.local = pathlib.Path(self._temporary.name)
        for name in resumed:
            if (folder / name).exists():
                filesystem().get_file(os.fspath(folder / name), str(self.local / name))
        self._thread.start()

    def sync(self) -> None:
        """Copy the files that have changed since the last copy."""
        if not is_bucket(self._folder):
            return
        with self._lock:
            now = {path: _version(path) for path in self.local.rglob('*') if path.is_file()}
            changed = [path for path, version in now.items() if self._sent.get(path) != version]
            upload({os.fspath(self._folder / path.relative_to(self.local).as_posix()): path for path in changed})
            self._sent = now

    def _run(self) -> None:
        while not self._end.wait(PERIOD_S):
            try:
                self.sync()
            except Exception as error:  # the next copy may succeed, and the copy before a checkpoint raises
                print(f'{self._folder}: the logs could not be copied ({error})', file=sys.stderr)

    def close(self) -> None:
        """Copy for the last time, and remove the local folder if it is temporary."""
        if not is_bucket(self._folder):
            return
        self._end.set()
        self._thread.join()
        self.sync()
        self._temporary.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def _version(path: pathlib.Path) -> tuple[int, int]:
    """Return the size and the time of a file; a later content of a log has others."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
