"""Tests of activation sharding: activations stay on the devices of their samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import dmd as dmd_config
from neodragon_jax.models.mesh import batch_axes, keep_batch_split
from train.aot.cost import analyze, collective_bytes
from train.aot.hlo import parse
from train.runtime import loop, runner
from train.runtime.sharding import MeshConfig, make_mesh

BATCH, WIDTH = 8, 32


def on_mesh(mesh, function):
    """Return a function compiled as `train.runtime.step.jit_step` compiles a step: with the mesh set."""

    def step(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(x)

    return jax.jit(step)


def test_off_a_mesh_nothing_happens():
    x = jnp.ones((3, 4))
    assert batch_axes() == ()
    assert keep_batch_split(x) is x


@pytest.mark.parametrize('shape', [(2, 4, 1), (2, 2, 2)])
def test_the_batch_is_split_over_all_axes_but_the_heads(shape):
    mesh = make_mesh(MeshConfig(*shape), jax.devices())
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.device_put(np.arange(BATCH * WIDTH, dtype=np.float32).reshape(BATCH, WIDTH), whole)
    out = on_mesh(mesh, lambda x: keep_batch_split(x) * 2)(x)
    np.testing.assert_array_equal(out, np.asarray(x) * 2)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))), out.ndim)


def test_a_batch_that_cannot_be_split_goes_through():
    mesh = make_mesh(MeshConfig(2, 4, 1), jax.devices())
    x = jax.device_put(np.ones((3, WIDTH), np.float32), NamedSharding(mesh, PartitionSpec()))
    np.testing.assert_array_equal(on_mesh(mesh, keep_batch_split)(x), np.asarray(x))


@pytest.mark.slow
def test_a_distillation_step_sends_gradients_and_no_activations():
    """In the backward pass of a scan, XLA's partitioner replicates the batch unless its sharding is constrained.

    Every device would then receive the activations of all samples: ten times these bytes here, and most of the step on
    a TPU.
    """
    settings = dmd_config.get_config('tiny')
    settings.dmd.fake_updates = 1
    settings.loop.mesh.update(data=1, fsdp=8)
    program, source, run = runner.size('dmd', settings)
    mesh = make_mesh(run.mesh, jax.devices())
    arguments = loop.abstract_arguments(program, program.frozen(), source, run, mesh)
    compiled = loop.jit_step(program, 0, arguments).lower(*arguments).compile()
    received = collective_bytes(analyze(parse(compiled.as_text())), dict(mesh.shape))
    state = jax.eval_shape(program.init_state, jax.random.key(0), program.frozen())
    gradients = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.student, state.fake)))
    assert 0 < received['all-reduce', 'fsdp'] < 3 * gradients
