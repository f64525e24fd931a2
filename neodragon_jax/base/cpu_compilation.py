"""Faster compilation on machines whose only devices are CPUs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

_LEVEL = '--xla_backend_optimization_level'


def compile_faster_on_cpus() -> None:
    """Set XLA's optimization level to 1 if JAX can use CPUs only; a level in XLA_FLAGS, or a file named there, is kept.

    At level 1 programs compile faster than at the default, 3, and run as fast (docs/results.md). JAX reads the level
    when it first looks for devices; later calls change nothing.
    """
    flags = os.environ.get('XLA_FLAGS', '')
    is_file = flags and not flags.lstrip().startswith('-')  # of flags, to which nothing can be added
    if not is_file and _LEVEL not in flags and _has_only_cpus():
        os.environ['XLA_FLAGS'] = f'{flags} {_LEVEL}=1'.strip()


def _has_only_cpus() -> bool:
    """Return whether JAX is restricted to CPUs, or has no plugin for another device."""
    chosen = os.environ.get('JAX_PLATFORMS')
    if chosen:
        return chosen == 'cpu'
    if any(importlib.util.find_spec(name) for name in ('jax_plugins', 'libtpu')):
        return False
    return not importlib.metadata.entry_points(group='jax_plugins')
