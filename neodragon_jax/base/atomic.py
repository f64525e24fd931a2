"""Files and folders that appear under their final name only when they are complete.

A writer works under a hidden draft name in the same folder; the rename at the end is one step of the file system. For a
path in a bucket the draft is on local disk and is uploaded at the end.
A reader finds either the old or the new content, never a part of it, even if the writer is killed. Drafts of killed
processes are removed by the next process that writes into the folder.
"""

from __future__ import annotations

import contextlib
import filecmp
import functools
import hashlib
import os
import pathlib
import re
import shutil
import socket
import uuid
from collections.abc import Iterator

from neodragon_jax.base import bucket
from neodragon_jax.base.errors import InputError

PathLike = str | os.PathLike[str]

# Prefix of the lock files of `folder_lock`, which do not count as content of a folder.
LOCK_PREFIX = '.lock'

# Hidden names: stem of the target, kind, host and process, a random part, suffix of the target.
_DRAFT, _REPLACED = 'draft', 'replaced'
_HIDDEN = re.compile(
    rf'\.(?P<stem>.+)\.(?P<kind>{_DRAFT}|{_REPLACED})-(?P<host>[0-9a-f]{{8}})-(?P<pid>\d+)-[0-9a-f]{{12}}'
    r'(?P<suffix>\.[^.]*)?'
)
# Folders from which this process has already removed the drafts of killed ones.
_SWEPT: set[pathlib.Path] = set()


@contextlib.contextmanager
def atomic_file(path: PathLike) -> Iterator[pathlib.Path]:
    """Yield a draft path with the same suffix, and rename it to `path` when the block ends without an exception.

    The parent folder is made if needed. After an exception, KeyboardInterrupt included, the draft is removed and
    `path` is as it was.

    Raises:
      InputError: `path` is a folder, or one of its parents is a file.
    """
    if bucket.is_bucket(path):
        with bucket.uploaded_file(path) as draft:
            yield draft
        return
    path = pathlib.Path(path)
    _refuse_folder(path)
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: PathLike, replace: bool = False, keep_equal: bool = False) -> Iterator[pathlib.Path]:
    """Yield a new temporary folder, and rename it to `path` when the block ends without an exception.

    Args:
      path: the folder to make; an empty one may exist. If it is a link, the folder that the link names.
      replace: whether a folder with content may exist. It stays until the new one is complete; of the two renames that
        swap them, the first is undone if the second fails.
      keep_equal: leave an existing folder as it is if it has every new file with the same content already, so that
        other files in it stay.
    Raises:
      InputError: `path` is a file, or a folder with content and not `replace`; the temporary folder is then not made.
    """
    if bucket.is_bucket(path):
        with bucket.uploaded_folder(path, replace, keep_equal) as draft:
            yield draft
        return
    # The temporary folder must be on the disk of the folder that it replaces.
    path = pathlib.Path(os.path.realpath(path) if os.path.islink(path) else path)
    _check_folder(path, replace)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        _check_folder(path, replace)
        if keep_equal and _holds(path, temporary):
            shutil.rmtree(temporary)
        else:
            _swap(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def scratch_folder(parent: PathLike) -> Iterator[pathlib.Path]:
    """Yield a new hidden folder in `parent` and remove it at the end; if this process is killed, the next one does."""
    temporary = _temporary(pathlib.Path(parent) / 'scratch')
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def made_folder(folder: PathLike) -> Iterator[None]:
    """Make a folder and its parents; at the end of the block, those that were absent and are empty are removed again.

    A command that fails before its first output therefore leaves nothing.

    Raises:
      InputError: a part of the path is a file.
    """
    folder = pathlib.Path(folder)
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    _make(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the first that is not empty ends the loop
            for path in absent:
                path.rmdir()


def check_writable(folder: PathLike) -> None:
    """Try to write into a folder, so that a long run does not fail at its end. The folder is not made.

    Raises:
      InputError: a part of the path is a file.
      OSError: the disk or the permissions do not allow it.
    """
    if bucket.is_bucket(folder):
        bucket.check_bucket(folder, 'output folder', write=True)
        return
    with made_folder(folder):
        probe = _temporary(pathlib.Path(folder) / 'probe')
        try:
            probe.write_bytes(b'\0')
        finally:
            probe.unlink(missing_ok=True)


def check_file_writable(path: PathLike, suffix: str = '') -> None:
    """Try to write beside a file that a long run is to make.

    Args:
      suffix: required end of the name, such as '.json', so that no input is overwritten; '' allows every name.
    Raises:
      InputError: it is a folder, its name has another suffix, or a part of the path is a file.
      OSError: the disk or the permissions do not allow it.
    """
    _refuse_folder(pathlib.Path(path))
    if suffix and pathlib.Path(path).suffix != suffix:
        raise InputError(f'{path}: give a name that ends in {suffix}.')
    check_writable(pathlib.Path(path).parent)


def _refuse_folder(path: pathlib.Path) -> None:
    if path.is_dir():
        raise InputError(f'{path} is a folder; give the name of a file.')


def _temporary(path: pathlib.Path) -> pathlib.Path:
    """Return an unused draft name beside `path`, with its suffix, and make the parent folder."""
    _make(path.parent)
    folder = path.parent.absolute()
    if folder not in _SWEPT:
        _SWEPT.add(folder)
        sweep(folder)
    return _hidden(path, _DRAFT)


def _make(folder: pathlib.Path) -> None:
    """Make a folder and its parents."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f'{folder} is, or lies under, a file; choose another folder.') from None


def _hidden(path: pathlib.Path, kind: str) -> pathlib.Path:
    """Return an unused hidden name beside `path`, with its suffix."""
    return path.with_name(f'.{path.stem}.{kind}-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:12]}{path.suffix}')


def sweep(folder: PathLike) -> None:
    """Remove the drafts that killed processes of this host left in a folder.

    A folder that a killed process had moved aside and not yet replaced gets its name back.
    """
    for path in sorted(pathlib.Path(folder).iterdir()):
        hidden = _HIDDEN.fullmatch(path.name)
        if hidden is None or hidden['host'] != _host() or is_alive(int(hidden['pid'])):
            continue
        target = path.with_name(hidden['stem'] + (hidden['suffix'] or ''))
        with contextlib.suppress(OSError):
            if hidden['kind'] == _REPLACED and not target.exists():
                os.rename(path, target)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


@functools.cache
def _host() -> str:
    """Return a short digest of this host and of its process namespace, which differs between containers."""
    space = pathlib.Path('/proc/self/ns/pid')
    numbers = os.readlink(space) if space.is_symlink() else ''
    return hashlib.sha256(f'{socket.gethostname()} {numbers}'.encode()).hexdigest()[:8]


def is_alive(pid: int) -> bool:
    """Return whether a process of this host exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _check_folder(path: pathlib.Path, replace: bool) -> None:
    """Raise InputError if a new folder must not replace the file or folder at `path`."""
    if path.exists() and not path.is_dir():
        raise InputError(f'{path} is a file; give the name of a folder.')
    if path.is_dir() and not replace and any(not child.name.startswith(LOCK_PREFIX) for child in path.iterdir()):
        raise InputError(f'{path} exists and is not empty; remove it or choose another folder.')


def _holds(path: pathlib.Path, new: pathlib.Path) -> bool:
    """Return whether the folder `path` has every file of the folder `new`, with the same content."""
    files = [(file, path / file.relative_to(new)) for file in new.rglob('*') if file.is_file()]
    return path.is_dir() and all(old.is_file() and filecmp.cmp(file, old, shallow=False) for file, old in files)


def _swap(new: pathlib.Path, path: pathlib.Path) -> None:
    """Rename the folder `new` to `path`, then delete the previous content."""
    if not path.exists():
        os.rename(new, path)
        return
    old = _hidden(path, _REPLACED)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old)
