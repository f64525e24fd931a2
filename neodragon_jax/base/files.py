"""Digests of files."""

from __future__ import annotations

import hashlib

from neodragon_jax.base.atomic import PathLike


def file_sha256(path: PathLike) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
