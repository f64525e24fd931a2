"""Compiled programs kept on disk or in a bucket, so that only the first run of a command compiles."""

from __future__ import annotations

import contextlib
import os
import pathlib
import warnings

import jax

from neodragon_jax.base.bucket import StoragePath, check_bucket, filesystem, is_bucket

# JAX's variable for the folder.
VARIABLE = 'JAX_COMPILATION_CACHE_DIR'
# Name of the cache in the folder of a run.
FOLDER = 'compiled'
# Bytes; JAX removes the least recently used programs above this.
MAX_BYTES = 4 * 2**30
# All programs are kept: a video runs some seventy small ones, and compiling them takes longer than reading them.
MIN_SECONDS = 0.0


def default_folder() -> pathlib.Path:
    """Return the folder of this project in the user's cache folder, XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path('~/.cache').expanduser()
    return pathlib.Path(root) / 'neodragon_jax' / 'compiled'


def use_compile_cache(tell: bool = True, shared: StoragePath | None = None) -> None:
    """Enable JAX's compilation cache on disk, or in a bucket.

    A folder already set by the caller or by JAX_COMPILATION_CACHE_DIR is kept. If the cache cannot be written, it stays
    off without an error.

    Args:
      tell: print one line with its folder and size, as one of several processes does.
      shared: folder of a run of several processes. If it is in a bucket, the cache is in it by default: JAX writes
        programs from process 0 only, so the disks of the other hosts would never have any.
    Raises:
      InputError: the folder that the caller has set is in a bucket that cannot be written.
    """
    chosen = jax.config.values['jax_compilation_cache_dir']
    if chosen and is_bucket(chosen):
        check_bucket(chosen, VARIABLE, write=True)
    elif not chosen:
        chosen = _choose(shared)
    if not chosen:
        return
    # Processes share the folder, and one may remove an entry that another is about to use; JAX then compiles.
    warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache entry')
    if tell:
        limit = jax.config.values['jax_compilation_cache_max_size']
        most = f', at most {limit / 1e6:.0f} MB' if limit > 0 else ''
        print(f'Compiled programs are kept in {chosen} ({_bytes(chosen) / 1e6:.0f} MB now{most}).')


def _choose(shared: StoragePath | None) -> str:
    """Configure the default cache; return its folder, or '' if it cannot be written."""
    if shared is not None and is_bucket(shared):
        filesystem()  # configures the library by which JAX reads and writes the folder
        # Without a limit of size: JAX keeps it with a lock that a bucket does not have.
        folder = os.fspath(shared / FOLDER)
        jax.config.update('jax_compilation_cache_dir', folder)
        return folder
    local = default_folder()
    try:
        local.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ''
    if not os.access(local, os.W_OK):
        return ''
    jax.config.update('jax_compilation_cache_dir', str(local))
    jax.config.update('jax_compilation_cache_max_size', MAX_BYTES)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', MIN_SECONDS)
    return str(local)


def _bytes(folder: str) -> int:
    """Return the size of the files of a folder, from which other processes remove some."""
    if is_bucket(folder):
        return sum(info['size'] for info in filesystem().find(folder, detail=True).values())
    size = 0
    for path in pathlib.Path(folder).glob('*'):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size
