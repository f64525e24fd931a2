"""Google Cloud Storage: access to buckets, copies of inputs on local disk, and uploads of outputs.

Libraries read and write local files, so inputs are staged in the user's cache folder and outputs are uploaded when
complete. An object of a bucket is always complete, a folder is not: while the files of a folder are uploaded it holds
the object `.incomplete`, and `staged` refuses it.

If STORAGE_EMULATOR_HOST is set, everything goes to that emulator, checkpoints included.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import filelock
from etils import epath
from tqdm import tqdm

from neodragon_jax.base.errors import InputError

SCHEME = 'gs://'
INCOMPLETE = '.incomplete'
# Seconds within which a bucket must answer before a run begins; gcsfs alone tries for a minute.
ANSWER_S = 20.0
# Objects in transit at once; more gain nothing on a host with one network card.
TRANSFERS = 8

# A path on a local disk or in a bucket; both have the methods of pathlib.Path.
StoragePath = pathlib.Path | epath.Path


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is in a bucket."""
    return os.fspath(path).startswith(SCHEME)


@functools.cache
def filesystem() -> Any:
    """Return the file system of buckets, an `fsspec` file system, after configuring every library that uses one.

    Raises:
      InputError: gcsfs is not installed.
    """
    emulator = os.environ.get('STORAGE_EMULATOR_HOST')
    if emulator:
        # TensorStore, which writes the arrays of checkpoints, has variables of its own.
        os.environ.setdefault('TENSORSTORE_GCS_HTTP_URL', emulator)
        os.environ.setdefault('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'emulator')
        os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
    try:
        import fsspec.config
        import gcsfs  # noqa: F401  (registers gs://)
    except ImportError:
        raise InputError("paths on gs:// need gcsfs: pip install 'neodragon-jax[gcs]'.") from None
    # It logs a traceback of every error that it raises.
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
    # Other processes write to the same folders, so a cached listing is wrong. epath and Orbax use the same options.
    fsspec.config.conf['gs'] = {'use_listings_cache': False, 'consistency': 'size'}
    return fsspec.filesystem('gs')


def check_bucket(path: str | os.PathLike[str], option: str, write: bool = False) -> None:
    """List one object of a path's bucket, so that a long run does not fail at its first checkpoint.

    Args:
      path: any path of the bucket.
      option: the option that the path is from, for error messages.
      write: also write an object under the path, and remove it.
    Raises:
      InputError: the bucket does not exist, or does not allow this.
    """
    name = os.fspath(path).removeprefix(SCHEME).partition('/')[0]
    files = filesystem()
    try:
        _first_answer(files, name)
        if write:
            probe = f'{os.fspath(path)}/.probe-{uuid.uuid4().hex}'
            files.pipe_file(probe, b'')
            files.rm_file(probe)
    except TimeoutError:
        raise InputError(
            f'{option} {path}: Google Cloud Storage does not answer within {ANSWER_S:.0f} s; check the network of this '
            'machine.'
        ) from None
    except FileNotFoundError:
        raise InputError(f'{option} {path}: there is no bucket {name}; create it or correct the name.') from None
    except Exception as error:  # gcsfs has no common class of errors
        reason = ' '.join(str(error).split())[:120] or type(error).__name__
        raise InputError(
            f'{option} {path}: bucket {name} refuses access ({reason}); run gcloud auth application-default login, or '
            'give the service account of this machine the role Storage Object Admin.'
        ) from None


def _first_answer(files: Any, bucket: str) -> None:
    """List one object of a bucket, within ANSWER_S.

    Raises:
      TimeoutError: there is no answer.
    """
    from fsspec.asyn import sync

    request = files._call  # `call` is the same without a time limit
    sync(files.loop, request, 'GET', 'b/{}/o', bucket, maxResults=1, json_out=True, timeout=ANSWER_S)


def stage_folder() -> pathlib.Path:
    """Return the folder of staged copies in the user's cache folder, XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path('~/.cache').expanduser()
    return pathlib.Path(root) / 'neodragon_jax' / 'buckets'


def staged(source: StoragePath, option: str, parts: Sequence[str] | None = None) -> pathlib.Path:
    """Return a local copy of a file or folder; download the files that are new or have changed.

    Complete files are not downloaded again after an interruption. The processes of one machine share a copy.

    Args:
      source: returned as it is if local.
      option: the option that the path is from, for error messages.
      parts: subfolders at any depth to copy, besides the files of the folders that they are in; None copies everything.
    Raises:
      InputError: nothing is there, its upload is unfinished, or the disk is too small.
    """
    if not is_bucket(source):
        return pathlib.Path(source)
    check_bucket(source, option)
    remote = os.fspath(source).removeprefix(SCHEME).rstrip('/')
    target = stage_folder() / remote
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(target.parent / f'.{target.name}.lock'):
        found = filesystem().find(remote, detail=True)
        if not found:
            raise InputError(f'{option} {source}: no such file or folder in the bucket.')
        files = {name: info for name, info in found.items() if _is_part(name.removeprefix(remote + '/'), parts)}
        if any(name.rpartition('/')[2] == INCOMPLETE for name in files):
            raise InputError(f'{option} {source}: its upload is unfinished; run the command that writes it again.')
        _download(files, {name: stage_folder() / name for name in files}, f'{option} {source}')
    return target


def _is_part(name: str, parts: Sequence[str] | None) -> bool:
    """Return whether a file of a folder is in one of its subfolders, or beside one on the way to it."""
    if parts is None or '/' not in name:
        return True
    folder = name.rpartition('/')[0] + '/'
    return any(folder.startswith(f'{part}/') or f'{part}/'.startswith(folder) for part in parts)


def _download(files: Mapping[str, Any], targets: Mapping[str, pathlib.Path], what: str) -> None:
    """Download the files whose copy is missing or has another size or time.

    Raises:
      InputError: the disk is too small.
    """
    absent = {name: info for name, info in files.items() if not _is_current(targets[name], info)}
    needed, there = sum(info['size'] for info in absent.values()), stage_folder()
    if needed > (free := shutil.disk_usage(there).free):
        raise InputError(
            f'{what}: {needed / 1e9:.1f} GB to copy, {free / 1e9:.1f} GB free in {there}; set XDG_CACHE_HOME to a '
            'larger disk, or mount the bucket with Cloud Storage FUSE and give its folder.'
        )

    def fetch(name: str) -> int:
        target, info = targets[name], absent[name]
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f'.{target.name}.part')
        filesystem().get_file(name, str(draft))
        os.utime(draft, (_time(info), _time(info)))
        os.replace(draft, target)
        return info['size']

    with (
        tqdm(total=needed, unit='B', unit_scale=True, desc=what, disable=not absent) as bar,
        concurrent.futures.ThreadPoolExecutor(TRANSFERS) as pool,
    ):
        for size in pool.map(fetch, absent):
            bar.update(size)


def _is_current(path: pathlib.Path, info: Mapping[str, Any]) -> bool:
    """Return whether a local copy has the size and the time of its object."""
    if not path.is_file():
        return False
    return path.stat().st_size == info['size'] and abs(path.stat().st_mtime - _time(info)) < 1e-3


def _time(info: Mapping[str, Any]) -> float:
    """Return the Unix time at which an object was written."""
    return info['mtime'].timestamp()


@contextlib.contextmanager
def uploaded_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yield a local draft with the same name, and upload it when the block ends without an exception."""
    with tempfile.TemporaryDirectory(prefix='neodragon-') as folder:
        draft = pathlib.Path(folder) / os.path.basename(path)
        yield draft
        filesystem().put_file(str(draft), os.fspath(path))


@contextlib.contextmanager
def uploaded_folder(
    path: str | os.PathLike[str], replace: bool = False, keep_equal: bool = False
) -> Iterator[pathlib.Path]:
    """Yield an empty local folder, and upload its files when the block ends without an exception.

    Nothing is uploaded from a folder without files.

    Args:
      replace: whether a folder with content may exist; its files are then removed.
      keep_equal: leave an existing folder as it is if it is complete and has every file with the same content already.
    Raises:
      InputError: there is content, and not `replace`.
    """
    remote = os.fspath(path)
    if not replace and filesystem().find(remote):
        raise InputError(f'{path} exists and is not empty; remove it or choose another folder.')
    with tempfile.TemporaryDirectory(prefix='neodragon-') as folder:
        yield pathlib.Path(folder)
        names = [file for file in sorted(pathlib.Path(folder).rglob('*')) if file.is_file()]
        files = {f'{remote}/{file.relative_to(folder).as_posix()}': file for file in names}
        if files and not (keep_equal and _holds(remote, files)):
            _replace(remote, files)


def _holds(remote: str, files: Mapping[str, pathlib.Path]) -> bool:
    """Return whether a folder is complete and has the given files with the same content."""
    found = {SCHEME + name: info for name, info in filesystem().find(remote, detail=True).items()}
    # An object without a hash, which several uploads were composed to, counts as another.
    return f'{remote}/{INCOMPLETE}' not in found and all(
        name in found and found[name].get('md5Hash') == _md5(file) for name, file in files.items()
    )


def _md5(file: pathlib.Path) -> str:
    """Return the hash of a file as Google Cloud Storage writes it."""
    with file.open('rb') as content:
        return base64.b64encode(hashlib.file_digest(content, 'md5').digest()).decode()


def _replace(remote: str, files: Mapping[str, pathlib.Path]) -> None:
    """Make the given files the content of a folder; it is marked as incomplete meanwhile."""
    marker = f'{remote}/{INCOMPLETE}'
    filesystem().pipe_file(marker, b'')
    keep = {name.removeprefix(SCHEME) for name in (*files, marker)}
    for old in set(filesystem().find(remote)) - keep:
        filesystem().rm_file(old)
    upload(files)
    filesystem().rm_file(marker)


def upload(files: Mapping[str, pathlib.Path]) -> None:
    """Upload files, several at once.

    Args:
      files: gs:// path -> local file.
    """
    with concurrent.futures.ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(lambda name: filesystem().put_file(str(files[name]), name), files))
