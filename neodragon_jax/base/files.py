"""Digests of files, and whether optional ones are there."""

from __future__ import annotations

import hashlib
import os
import pathlib

from neodragon_jax.base.atomic import PathLike
from neodragon_jax.base.errors import InputError


def file_sha256(path: PathLike) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


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
