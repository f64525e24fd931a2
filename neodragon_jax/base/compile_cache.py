"""Compiled programs kept on disk, so that only the first run of a command compiles."""

from __future__ import annotations

import contextlib
import os
import pathlib
import warnings

import jax

# Bytes; JAX removes the least recently used programs above this.
MAX_BYTES = 4 * 2**30
# All programs are kept: a video runs some seventy small ones, and compiling them takes longer than reading them.
MIN_SECONDS = 0.0


def default_folder() -> pathlib.Path:
    """Return the folder of this project in the user's cache folder, XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path('~/.cache').expanduser()
    return pathlib.Path(root) / 'neodragon_jax' / 'compiled'


def use_compile_cache(tell: bool = True) -> None:
    """Enable JAX's compilation cache on disk.

    A folder already set by the caller or by JAX_COMPILATION_CACHE_DIR is kept. If the cache cannot be written, it stays
    off without an error.

    Args:
      tell: print one line with its folder and size, as one of several processes does.
    """
    chosen = jax.config.values['jax_compilation_cache_dir']
    folder = pathlib.Path(chosen) if chosen else default_folder()
    if not chosen:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if not os.access(folder, os.W_OK):
            return
        jax.config.update('jax_compilation_cache_dir', str(folder))
        jax.config.update('jax_compilation_cache_max_size', MAX_BYTES)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', MIN_SECONDS)
    # Processes share the folder, and one may remove an entry that another is about to use; JAX then compiles.
    warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache entry')
    if tell:
        limit = jax.config.values['jax_compilation_cache_max_size']
        most = f', at most {limit / 1e6:.0f} MB' if limit > 0 else ''
        print(f'Compiled programs are kept in {folder} ({_bytes(folder) / 1e6:.0f} MB now{most}).')


def _bytes(folder: pathlib.Path) -> int:
    """Return the size of the files of a folder, from which other processes remove some."""
    size = 0
    for path in folder.glob('*'):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size
