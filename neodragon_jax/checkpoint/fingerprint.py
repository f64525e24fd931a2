"""Identity of the folder of a component or a tokenizer."""

from __future__ import annotations

import hashlib
import os

from neodragon_jax.base.files import file_sha256
from neodragon_jax.base.paths import input_path

# Bytes that `sampled_fingerprint` reads of a file.
SAMPLE = 2**16

# Configs, weights, and the vocabularies of tokenizers. Others, such as README.md, do not count.
_SUFFIXES = ('.json', '.safetensors', '.txt', '.model')


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """Return a short SHA-256 of the files of a component or a tokenizer; copying or moving the folder keeps it.

    A folder in a bucket is copied first.
    """
    digest = hashlib.sha256()
    for path in sorted(input_path(folder, 'folder').iterdir()):
        if path.suffix in _SUFFIXES:
            digest.update(path.name.encode())
            digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()[:16]


def sampled_fingerprint(folder: str | os.PathLike[str]) -> str:
    """Return a short SHA-256 of the sizes of a folder's files and of SAMPLE bytes in the middle of each.

    It takes no time on large weights. Trained weights differ from others in every part; an edit elsewhere is not seen.
    """
    digest = hashlib.sha256()
    for path in sorted(input_path(folder, 'folder').iterdir()):
        if path.suffix in _SUFFIXES:
            size = path.stat().st_size
            with path.open('rb') as file:
                file.seek(max(size - SAMPLE, 0) // 2)
                digest.update(f'{path.name} {size} '.encode() + file.read(SAMPLE))
    return digest.hexdigest()[:16]
