"""Lists of prompts in files: text with one prompt per line, or VBench's list."""

from __future__ import annotations

import os
import pathlib

from neodragon_jax.base.errors import InputError
from neodragon_jax.evaluation import vbench


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Return the prompts of a file, in order and without repetitions.

    Args:
      path: of a text file with one prompt per line, or of VBench's `VBench_full_info.json`.
    Raises:
      InputError: there is no such file, or no prompt in it.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f'{path}: no such file. Give a text file with one prompt per line.')
    if path.suffix == '.json':
        return vbench.read_prompts(path)
    try:
        lines = [line.strip() for line in path.read_text(encoding='utf-8').splitlines()]
    except UnicodeDecodeError:
        raise InputError(f'{path}: not UTF-8 text. Save it as UTF-8, one prompt per line.') from None
    if not any(lines):
        raise InputError(f'{path}: empty. Write one prompt per line.')
    return list(dict.fromkeys(line for line in lines if line))
