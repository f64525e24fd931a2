"""The optimization level that commands ask of XLA on machines without accelerators."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys

import pytest

from neodragon_jax.base.cpu_compilation import compile_faster_on_cpus

LEVEL_1 = '--xla_backend_optimization_level=1'
COMMAND = """
import jax
from neodragon_jax.base.command_line import exit_status
exit_status(lambda: jax.jit(lambda x: x + 1)(1.0))
"""


@pytest.mark.parametrize(
    ('flags', 'platforms', 'plugin', 'want'),
    [
        (None, None, False, LEVEL_1),
        (None, 'cpu', True, LEVEL_1),
        ('--xla_cpu_copy_insertion_use_region_analysis=true', None, False, None),
        ('--xla_backend_optimization_level=3', None, False, '--xla_backend_optimization_level=3'),
        ('/etc/xla_flags.txt', None, False, '/etc/xla_flags.txt'),
        (None, None, True, None),
        (None, 'cuda,cpu', False, None),
        (None, 'tpu', True, None),
    ],
)
def test_level_1_unless_a_level_is_given_or_there_may_be_an_accelerator(flags, platforms, plugin, want, monkeypatch):
    for name, value in (('XLA_FLAGS', flags), ('JAX_PLATFORMS', platforms)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    found = importlib.machinery.ModuleSpec('libtpu', None) if plugin else None
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: found if name == 'libtpu' else None)
    monkeypatch.setattr(importlib.metadata, 'entry_points', lambda **_: ())
    compile_faster_on_cpus()
    if flags and flags.startswith('-') and 'level' not in flags:
        want = f'{flags} {LEVEL_1}'
    assert os.environ.get('XLA_FLAGS') == want


def test_the_level_reaches_the_compiler(tmp_path):
    """XLA writes the options with which it compiles."""
    environment = os.environ | {'XLA_FLAGS': f'--xla_dump_to={tmp_path}', 'JAX_PLATFORMS': 'cpu'}
    environment.pop('JAX_DISABLE_MOST_OPTIMIZATIONS')
    environment['JAX_ENABLE_COMPILATION_CACHE'] = 'false'
    subprocess.run([sys.executable, '-c', COMMAND], env=environment, check=True)
    options = ''.join(path.read_text() for path in tmp_path.glob('*debug_options*'))
    assert set(re.findall(r'xla_backend_optimization_level: (\d)', options)) == {'1'}
