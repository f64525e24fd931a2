"""Checksums of arrays: the same on every mesh and for every type, and another after any change."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from neodragon_jax.base.processes import start_processes
from support.jobs import Job
from train.runtime.checksum import checksums
from train.runtime.sharding import AXES, FSDP, MeshConfig, make_mesh

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


def many_checksums(sizes: tuple[int, int, int]) -> dict[str, int]:
    """Return the checksums of a state with as many arrays as a distillation has, just before its step has ended."""
    mesh, made = make_mesh(MeshConfig(*sizes)), {}
    for number in range(400):
        array = number + np.arange(4096, dtype=np.uint32).reshape(64, 64)
        sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(None, (None, FSDP, AXES)[number % 3]))
        made[str(number)] = jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    @jax.jit
    def step(state):
        busy = jax.lax.fori_loop(0, 200, lambda _, x: jnp.tanh(x @ x), jnp.full((512, 512), 1e-3))
        return jax.tree.map(lambda array: array + (busy[0, 0] > 1).astype(array.dtype), state)

    return checksums(step(made))


def test_many_arrays_on_two_processes(tmp_path):
    """The sums of many programs once waited for each other, so that a run stopped at its first checkpoint."""
    with Job([__file__], tmp_path / 'log.txt') as job:
        assert job.wait() == 0, job.output
        found = re.findall(r'sums (\{.*\})', job.output)
    assert [json.loads(text) for text in found] == [many_checksums((8, 1, 1))] * 2


if __name__ == '__main__':
    start_processes()
    print('sums', json.dumps(many_checksums((2, 4, 1))), flush=True)
