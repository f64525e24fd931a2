"""Folders of training runs."""

from __future__ import annotations

import hashlib
import pathlib
import shutil

from support.toy_program import checkpoint_steps
from train.runtime.loop import CHECKPOINTS
from train.runtime.results import RESULT


def digests(folder: pathlib.Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder by relative path."""
    files = [path for path in folder.rglob('*') if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def copy_killed(workdir: pathlib.Path, step: int, out: pathlib.Path) -> pathlib.Path:
    """Copy a finished run to `out` as if it had been killed before its next checkpoint after `step`; return `out`.

    Logs go on beyond the checkpoint, as after a real kill. Resuming the copy costs half of training it from the start.
    """

    def lost(folder: str, names: list[str]) -> list[str]:
        if pathlib.Path(folder) == workdir:
            return [name for name in names if name == RESULT]
        later = lambda name: name.isdigit() and int(name) > step
        return [name for name in names if pathlib.Path(folder) == workdir / CHECKPOINTS and later(name)]

    shutil.copytree(workdir, out, ignore=lost, dirs_exist_ok=True)
    assert checkpoint_steps(out)[-1] == step and not (out / RESULT).exists()
    return out
