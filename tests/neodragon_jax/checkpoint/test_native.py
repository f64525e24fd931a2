"""The stable names of `neodragon_jax.checkpoint`, and checkpoints of Orbax: round trip, resharding and errors."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import neodragon_jax.checkpoint as c
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint.abstract import abstract_params
from support.goldens import ROOT, TINY_CHECKPOINT

ADAPTER = TINY_CHECKPOINT / 'context_adapter'


def test_stable_names(tmp_path):
    module, params = c.load(ADAPTER)
    c.save(tmp_path / 'copy', module, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, c.load(tmp_path / 'copy')[1]))
    assert {'load', 'save', 'save_native', 'restore_native'} <= set(dir(c))
    with pytest.raises(AttributeError, match='no attribute'):
        c.lode  # noqa: B018


def test_the_package_imports_nothing_heavy_before_its_first_use():
    code = 'import sys, neodragon_jax.checkpoint as c; dir(c); print([n for n in ("jax", "orbax") if n in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


def split(tree, mesh: Mesh, axis: str):
    """Return the shapes of a tree, with the rows that can be split over an axis split."""
    size = mesh.shape[axis]
    spec = lambda x: PartitionSpec(axis) if x.shape[0] % size == 0 else PartitionSpec()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x))), tree)


def test_native_round_trip_and_resharding(tmp_path):
    """A component that was saved from one mesh is restored as it was, onto another mesh, and in another type."""
    module, params = c.load(ADAPTER)
    shapes = abstract_params(module)
    devices = np.array(jax.devices()[:4])
    saved = split(shapes, Mesh(devices, ('x',)), 'x')
    sharded = jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), params, saved)
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(sharded))
    c.save_native(tmp_path / 'native', sharded)
    other = split(shapes, Mesh(devices.reshape(2, 2), ('y', 'z')), 'z')
    narrow = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), other)
    for target, want in ((None, saved), (saved, saved), (other, other), (narrow, narrow)):
        restored = c.restore_native(tmp_path / 'native', target)
        for x, at, value in zip(*map(jax.tree.leaves, (restored, want, params)), strict=True):
            assert x.sharding == at.sharding
            np.testing.assert_array_equal(x, value.astype(at.dtype))


def test_native_errors_are_one_line(tmp_path):
    tree = {'kernel': np.zeros((8, 2), np.float32)}
    c.save_native(tmp_path / 'native', tree)
    (tmp_path / 'empty').mkdir()
    shape = lambda *sizes, **given: jax.ShapeDtypeStruct(sizes, jnp.float32, **given)
    split = {'sharding': NamedSharding(Mesh(np.array(jax.devices()[:2]), 'x'), PartitionSpec('x'))}
    for folder, target, message in (
        ('other', None, 'no such folder'),
        ('empty', None, 'not a complete Orbax checkpoint'),
        ('native', {'kernel': shape(8, 2), 'bias': shape(2)}, 'not a complete Orbax checkpoint of this tree'),
        ('native', {'kernel': shape(16, 2, **split)}, r'not a complete .*\(16, 2\).*\(8, 2\)'),
        # Without a sharding, Orbax ignores the shape.
        ('native', {'kernel': shape(16, 2)}, r'kernel is float32 \[8, 2\], not float32 \[16, 2\]'),
        ('native', {'kernel': np.zeros((16, 2))}, r'kernel is .* \[8, 2\], not float64 \[16, 2\]'),
    ):
        with pytest.raises(InputError, match=message) as caught:
            c.restore_native(tmp_path / folder, target)
        assert folder in str(caught.value) and '\n' not in str(caught.value)
    with pytest.raises(InputError, match='native: exists'):
        c.save_native(tmp_path / 'native', tree)
    with pytest.raises(InputError, match='gs://bucket/x'):
        c.save_native('gs://bucket/x', tree)
