"""Shared by all tests: eight virtual devices, the compile cache, and access to the golden arrays."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import pathlib
from collections.abc import Iterator
from typing import Any

# Before JAX is imported: one CPU stands for eight devices, and nothing asks a hub for files.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
# Tests compile for minutes and run for milliseconds. XLA's older CPU code generator compiles faster, and so does a
# program in one piece; places in the source are left out of it. On a busy machine, the threads of eight virtual devices
# may wait for one another for longer than 40 s, after which XLA aborts by default.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')
os.environ.setdefault(
    'XLA_FLAGS',
    # The level is that of JAX_DISABLE_MOST_OPTIMIZATIONS. Commands that tests run keep it only if it is named here; the
    # keys of compiled programs depend on it.
    '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 '
    '--xla_cpu_collective_call_terminate_timeout_seconds=300'
    # Newer XLA aborts at the name of the generator that it no longer has.
    + (' --xla_cpu_use_fusion_emitters=false' if importlib.metadata.version('jaxlib').startswith('0.10.') else ''),
)
# As many test processes run as there are cores; threads of each would wait for one another.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
os.environ.setdefault('OMP_NUM_THREADS', '1')

from support.goldens import ROOT, TINY_CHECKPOINT

# Everything compiled is shared by all tests and the commands that they start. JAX_COMPILATION_CACHE_DIR names another
# folder; an empty one gives the times of a clean checkout.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(ROOT / 'out' / 'jax_cache'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

# Commands that tests start find the project and the test helpers, wherever they run.
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / 'tests'), os.environ.get('PYTHONPATH')]))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from neodragon_jax.base.bucket import filesystem
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.config.super_resolution import variant
from neodragon_jax.models.super_resolution import QuickSRNet
from support.bucket_server import bucket_server

# Tracing makes many objects that live long: looking for cycles among them takes a twentieth of the time.
gc.set_threshold(50_000, 5, 5)


@pytest.fixture(scope='session')
def upscaler(tmp_path_factory) -> pathlib.Path:
    """The folder of a QuickSRNet near the identity that it starts from, like a trained one."""
    folder = tmp_path_factory.mktemp('upscaler')
    network = QuickSRNet(variant('small'), randomness=0.3)
    params = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))['params']
    checkpoint.save(folder, network, jax.tree.map(np.asarray, params))
    return folder


@pytest.fixture(scope='session')
def tiny_checkpoint() -> pathlib.Path:
    """The miniature checkpoint in the released layout."""
    return TINY_CHECKPOINT


@pytest.fixture(scope='session')
def bucket_store() -> Iterator[Any]:
    """The file system of an emulator of Google Cloud Storage."""
    with bucket_server():
        yield filesystem()


@pytest.fixture
def bucket(bucket_store, request, tmp_path, monkeypatch) -> epath.Path:
    """An empty bucket of the emulator; copies of its files go to a folder of this test."""
    name = f'bucket-{abs(hash(request.node.nodeid))}'
    bucket_store.mkdir(name)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return epath.Path(f'gs://{name}')
