"""Files that the system cannot read for a while."""

from __future__ import annotations

import errno
import io
import os
import pathlib

import pytest


def lose(monkeypatch: pytest.MonkeyPatch, name: str, number: int = errno.EIO) -> None:
    """Let files of a name fail with an error of the system wherever `pathlib` opens them, until the patch is undone."""
    real = io.open

    def opened(path, *given, **options):
        if not isinstance(path, int) and pathlib.Path(path).name == name:
            raise OSError(number, os.strerror(number))
        return real(path, *given, **options)

    monkeypatch.setattr(io, 'open', opened)
