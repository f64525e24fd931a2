"""Tests of the persistent compile cache: it is in the user's cache folder by default, and is never a reason to fail."""

from __future__ import annotations

import os
import subprocess
import sys

from support.goldens import ROOT

CODE = """
import jax, jax.numpy as jnp
from neodragon_jax.base.compile_cache import use_compile_cache
use_compile_cache()
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4))).sum())
use_compile_cache()
use_compile_cache(tell=False)
"""


def lines(**variables: str) -> list[str]:
    """Run CODE in a separate process and return the lines that it prints."""
    kept = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
    run = subprocess.run(
        [sys.executable, '-c', CODE], capture_output=True, text=True, cwd=ROOT, env=kept | variables, check=True
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
