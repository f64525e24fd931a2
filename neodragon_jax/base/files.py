"""Digests of files, whether optional ones are there, and whose fault an error of reading is."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pathlib
from collections.abc import Iterator

from neodragon_jax.base.atomic import PathLike
from neodragon_jax.base.errors import InputError


def file_sha256(path: PathLike) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal digits; an error of the system names the file."""
    with naming(path), open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def is_system_error(error: Exception) -> bool:
    """Return whether the system could not read a file, such as from a lost disk, or with too many files open.

    That says nothing about its content. Libraries raise OSError for damage, too: without a number, or because damage
    leads to a place that no file has.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


@contextlib.contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Let errors of the system inside the block name a file; those of reading an open one do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


def is_there(path: PathLike) -> bool:
    """Return whether an optional file or folder of an input exists.

    Raises:
      InputError: it is a link to something that does not exist. Taken for absent, it would be left out in silence.
    """
    path = pathlib.Path(path)
    if path.is_symlink() and not path.exists():
        raise InputError(
            f'{path}: a link to {os.readlink(path)}, which does not exist; copy or download its target again, or '
            'remove the link if this part is not wanted.'
        )
    return path.exists()
