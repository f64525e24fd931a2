"""Folders that all test processes of a run make once and share."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import pytest
from filelock import FileLock


def shared_folder(factory: pytest.TempPathFactory, name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
    """Return the folder `name` of this run; the first process that asks for it fills it with make(folder).

    Tests read it and copy what they change. If make fails, the next process tries again.
    """
    base = factory.getbasetemp()
    # Each process of pytest-xdist has a folder of its own inside that of the run.
    root = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
    folder, done = root / f'shared-{name}', root / f'shared-{name}.done'
    with FileLock(root / f'shared-{name}.lock'):
        if not done.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            done.touch()
    return folder
