"""Output files: tried before a run, and complete when they appear under their names."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

import av.error

from neodragon_phone.errors import BundleError


def check_output(path: pathlib.Path, option: str) -> None:
    """Try to write beside a path, so that a run does not fail at its end; nothing is left behind.

    Raises:
      BundleError: it is a folder, or cannot be written; the message names the option.
    """
    made: list[pathlib.Path] = []
    draft = _draft(path)
    try:
        with _refused(path, option):
            made += [folder for folder in path.absolute().parents if not folder.exists()]
            if path.is_dir():
                raise IsADirectoryError(None, 'it is a folder')
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(b'\0')
    finally:
        _remove(draft)
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def written(path: pathlib.Path, option: str) -> Iterator[pathlib.Path]:
    """Yield a draft beside a path, and rename it to the path if the block ends without an exception.

    Raises:
      BundleError: the file cannot be written, or not encoded; the message names the option.
    """
    draft = _draft(path)
    try:
        with _refused(path, option):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield draft
            draft.replace(path)
    finally:
        _remove(draft)


def reason_of(error: Exception) -> str:
    """Return why a file was refused, in one line."""
    if isinstance(error, FileExistsError | NotADirectoryError):  # of making the parent folder
        return 'a part of the path is a file'
    return getattr(error, 'strerror', None) or str(error).partition('\n')[0] or type(error).__name__


@contextlib.contextmanager
def _refused(path: pathlib.Path, option: str) -> Iterator[None]:
    """Turn the exceptions of files and encoders into a BundleError."""
    try:
        yield
    except (OSError, ValueError, av.error.FFmpegError) as error:  # most errors of FFmpeg are no OSError
        raise BundleError(f'{option} {path}: cannot be written ({reason_of(error)}). Give another {option}.') from None


def _draft(path: pathlib.Path) -> pathlib.Path:
    return path.parent / f'.{path.name}.{os.getpid()}{path.suffix}'


def _remove(draft: pathlib.Path) -> None:
    with contextlib.suppress(OSError, ValueError):  # a parent that is a file, or a name that no file has
        draft.unlink()
