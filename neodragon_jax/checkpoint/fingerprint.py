"""Identity of a component folder."""

from __future__ import annotations

import hashlib
import os
import pathlib

from neodragon_jax.base.files import file_sha256


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """Return a short SHA-256 of a component's config and weights; copying or moving the folder keeps it."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(folder).iterdir()):
        if path.suffix in ('.json', '.safetensors'):
            digest.update(path.name.encode())
            digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()[:16]
