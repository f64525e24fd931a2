"""Checksums of arrays: the same on every mesh and for every type, and another after any change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from train.runtime.checksum import checksums
from train.runtime.sharding import AXES, MeshConfig, make_mesh

RNG = np.random.default_rng(0)
ARRAYS = {
    'float32': RNG.standard_normal((8, 3, 16)).astype(np.float32),
    'bfloat16': np.asarray(RNG.standard_normal((8, 16)), jnp.bfloat16),
    'int32': RNG.integers(-9, 9, (16,)).astype(np.int32),
    'uint8': RNG.integers(0, 255, (8, 8)).astype(np.uint8),
    'bool': RNG.integers(0, 2, (8,)).astype(bool),
}


def number_of(array: np.ndarray) -> int:
    return checksums({'array': array})['array']


def test_every_mesh_has_the_same_checksums():
    want = checksums(ARRAYS)
    assert list(want) == sorted(ARRAYS) and len(set(want.values())) == len(ARRAYS)
    for sizes in ((8, 1, 1), (2, 2, 2), (1, 4, 2)):
        sharding = jax.sharding.NamedSharding(make_mesh(MeshConfig(*sizes)), PartitionSpec(AXES))
        assert checksums(jax.device_put(ARRAYS, sharding)) == want


@pytest.mark.parametrize('name', ARRAYS)
def test_every_change_is_seen(name):
    array, sum_before = ARRAYS[name], number_of(ARRAYS[name])
    content = array.tobytes()
    for place in RNG.choice(len(content), 20):
        bit = 1 if name == 'bool' else 1 << RNG.integers(0, 8)
        changed = bytearray(content)
        changed[place] ^= bit
        assert number_of(np.frombuffer(bytes(changed), array.dtype).reshape(array.shape)) != sum_before
    flat = array.reshape(-1).copy()
    other = np.flatnonzero(flat != flat[0])[0]
    flat[[0, other]] = flat[[other, 0]]
    assert number_of(flat.reshape(array.shape)) != sum_before


def test_a_scalar_has_one():
    assert number_of(np.float32(1.0)) == np.float32(1.0).view(np.uint32)
