"""Shared by all tests: eight virtual devices, the compile cache, and access to the golden arrays."""

from __future__ import annotations

import os
import pathlib

# Before JAX is imported: one CPU stands for eight devices, and nothing asks a hub for files.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
# Tests compile for minutes and run for milliseconds.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax import checkpoint
from neodragon_jax.config_super_resolution import variant
from neodragon_jax.models.super_resolution import QuickSRNet

GOLDENS = pathlib.Path(__file__).parent / 'goldens'
TINY_CHECKPOINT = GOLDENS / 'tiny_checkpoint'

jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(__file__).parent.parent / 'out' / 'jax_cache'))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


@pytest.fixture(scope='session')
def upscaler(tmp_path_factory) -> pathlib.Path:
    """The folder of a QuickSRNet near the identity that it starts from, like a trained one."""
    folder = tmp_path_factory.mktemp('upscaler')
    network = QuickSRNet(variant('small'), randomness=0.3)
    params = network.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))['params']
    checkpoint.save(folder, network, jax.tree.map(np.asarray, params))
    return folder


def relative_error(got, want) -> float:
    """Return |got - want| / |want| in the Euclidean norm, in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def channels_last(video: np.ndarray) -> np.ndarray:
    """Return the golden layout [B, C, T, H, W] as ours, [B, T, H, W, C]."""
    return np.moveaxis(video, 1, -1)


def load_golden(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of tests/goldens/{name}/golden.npz by name."""
    with np.load(GOLDENS / name / 'golden.npz') as arrays:
        return dict(arrays)


@pytest.fixture(scope='session')
def tiny_checkpoint() -> pathlib.Path:
    """The miniature checkpoint in the released layout."""
    return TINY_CHECKPOINT
