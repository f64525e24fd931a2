"""Tests of the persistent compile cache: it is in the user's cache folder by default, and is never a reason to fail."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest

from neodragon_jax.base.compile_cache import use_compile_cache
from neodragon_jax.base.errors import InputError
from support.goldens import ROOT

CODE = """
import sys, jax, jax.numpy as jnp
from neodragon_jax.base.compile_cache import use_compile_cache
from neodragon_jax.base.paths import storage_path
shared = storage_path(sys.argv[1], 'the run') if sys.argv[1:] else None
use_compile_cache(shared=shared)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))).sum())
use_compile_cache()
use_compile_cache(tell=False)
"""


def lines(*shared: str, **variables: str) -> list[str]:
    """Run CODE in a separate process and return the lines that it prints.

    Args:
      shared: the folder of a run of several processes, if there is one.
    """
    kept = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
    run = subprocess.run(
        [sys.executable, '-c', CODE, *shared],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=kept | variables,
        check=True,
    )
    return run.stdout.splitlines()


def test_programs_are_kept_in_the_users_cache_folder(tmp_path):
    first, _, last = lines(XDG_CACHE_HOME=str(tmp_path))
    folder = tmp_path / 'neodragon_jax' / 'compiled'
    assert first == last == f'Compiled programs are kept in {folder} (0 MB now, at most 4295 MB).'
    assert any(path.stat().st_size > 0 for path in folder.iterdir())


def test_a_chosen_folder_stays(tmp_path):
    first, *_ = lines(XDG_CACHE_HOME=str(tmp_path / 'a'), JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'b'))
    assert str(tmp_path / 'b') in first and not (tmp_path / 'a').exists()


def test_a_folder_that_cannot_be_made_is_left_out(tmp_path):
    (tmp_path / 'file').write_text('')
    assert len(lines(XDG_CACHE_HOME=str(tmp_path / 'file'))) == 1


def test_a_bucket_keeps_programs(bucket, bucket_store):
    """The line showed gs:/, and nothing in it, which looks like a folder of this machine."""
    folder = f'{bucket}/cache'
    first, *_ = lines(JAX_COMPILATION_CACHE_DIR=folder)
    assert first == f'Compiled programs are kept in {folder} (0 MB now).'
    files = bucket_store.find(folder)
    assert any('lambda' in name for name in files)
    bucket_store.pipe_file(f'{folder}/large-cache', bytes(3_000_000))
    first, *_ = lines(JAX_COMPILATION_CACHE_DIR=folder)
    assert first == f'Compiled programs are kept in {folder} (3 MB now).'
    assert set(bucket_store.find(folder)) == {*files, f'{folder}/large-cache'.removeprefix('gs://')}


def test_processes_of_a_run_in_a_bucket_share_its_cache(bucket, bucket_store, tmp_path):
    """JAX writes programs from process 0 only: the disks of the other hosts stay empty."""
    first, *_ = lines(f'{bucket}/run', XDG_CACHE_HOME=str(tmp_path / 'a'))
    assert first == f'Compiled programs are kept in {bucket}/run/compiled (0 MB now).'
    assert bucket_store.find(f'{bucket}/run/compiled') and not (tmp_path / 'a' / 'neodragon_jax').exists()
    first, *_ = lines(str(tmp_path / 'run'), XDG_CACHE_HOME=str(tmp_path / 'a'))
    assert str(tmp_path / 'a') in first


def test_a_bucket_that_does_not_exist_is_refused(bucket):
    before = jax.config.values['jax_compilation_cache_dir']
    jax.config.update('jax_compilation_cache_dir', 'gs://no-such-bucket/cache')
    try:
        with pytest.raises(InputError, match='CACHE_DIR gs://no-such-bucket/cache: there is no bucket'):
            use_compile_cache()
    finally:
        jax.config.update('jax_compilation_cache_dir', before)
