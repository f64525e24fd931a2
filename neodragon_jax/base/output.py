"""Output folders: held by one process, free of the drafts of killed ones, and known to be writable."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from neodragon_jax.base.atomic import PathLike, check_writable
from neodragon_jax.base.folder_lock import folder_lock

# Errors of a disk rather than of a path.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextlib.contextmanager
def output_folder(folder: PathLike, process: int = 0, processes: int = 1) -> Iterator[None]:
    """Hold the output folder of a program while the block runs; call it before any long work.

    It is made if absent. Drafts that killed processes have left in it are removed.

    Args:
      process, processes: index of this process, and number of the processes that write into the folder together.
    Raises:
      InputError: the folder is a file, or another process has it.
      OSError: the disk or the permissions do not allow writing.
    """
    try:
        with folder_lock(folder, str(process) if processes > 1 else ''):
            check_writable(folder)
            yield
    except OSError as error:
        # A write to an open file does not name it.
        if error.errno in DISK_ERRORS and error.filename is None:
            error.filename = os.fspath(folder)
        raise
