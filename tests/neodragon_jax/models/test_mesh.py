"""Tests of activation sharding: activations stay on the devices of their samples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import dmd as dmd_config
from neodragon_jax.models.mesh import batch_axes, keep_batch_split, split_inputs
from neodragon_jax.models.modulation import OffsetLinear
from train.aot.cost import analyze, collective_bytes
from train.aot.hlo import parse
from train.runtime import loop, runner
from train.runtime.sharding import MeshConfig, batch_sharding, make_mesh

BATCH, WIDTH = 8, 32


def on_mesh(mesh, function):
    """Return a function compiled as `train.runtime.step.jit_step` compiles a step: with the mesh set."""

    def step(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(x)

    return jax.jit(step)


def test_off_a_mesh_nothing_happens():
    x = jnp.ones((3, 4))
    assert batch_axes(8) == ()
    assert keep_batch_split(x) is x
    assert split_inputs(x) is x


@pytest.mark.parametrize('shape', [(2, 4, 1), (2, 2, 2)])
def test_the_batch_is_split_over_all_axes_but_the_heads(shape):
    mesh = make_mesh(MeshConfig(*shape), jax.devices())
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.device_put(np.arange(BATCH * WIDTH, dtype=np.float32).reshape(BATCH, WIDTH), whole)
    out = on_mesh(mesh, lambda x: keep_batch_split(x) * 2)(x)
    np.testing.assert_array_equal(out, np.asarray(x) * 2)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))), out.ndim)


@pytest.mark.parametrize(
    ('rows', 'axes'),
    [(16, ('data', 'fsdp')), (8, ('data', 'fsdp')), (4, ('fsdp',)), (12, ('fsdp',)), (2, ('data',)), (3, ())],
)
def test_a_part_of_a_batch_is_split_over_the_axes_that_divide_it(rows, axes):
    """A few roll-outs, the parts of an accumulated batch, or the videos of an evaluation."""
    mesh = make_mesh(MeshConfig(2, 4, 1), jax.devices())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert batch_axes(rows) == axes


def test_a_batch_that_cannot_be_split_goes_through():
    mesh = make_mesh(MeshConfig(2, 4, 1), jax.devices())
    x = jax.device_put(np.ones((3, WIDTH), np.float32), NamedSharding(mesh, PartitionSpec()))
    np.testing.assert_array_equal(on_mesh(mesh, keep_batch_split)(x), np.asarray(x))
    np.testing.assert_array_equal(on_mesh(mesh, split_inputs)(x), np.asarray(x))


@pytest.mark.parametrize('shape', [(1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (8, 1, 1)])
def test_modulation_exchanges_sums_and_not_its_kernel(shape):
    """Without the constraint, a step on 16 x 16 devices gathered the kernels of all blocks in float32."""
    mesh, parts = make_mesh(MeshConfig(*shape), jax.devices()), 6
    linear = OffsetLinear((0.0,) * parts)
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(BATCH, 256)).astype(np.float32), rng.normal(size=(256, parts, 256)).astype(np.float32)

    def gradients(x, kernel):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            params = {'kernel': kernel, 'bias': jnp.zeros((parts, 256))}
            out = lambda x, kernel: linear.apply({'params': params | {'kernel': kernel}}, x)
            return out(x, kernel), jax.grad(lambda *given: jnp.sum(jnp.square(out(*given))), argnums=(0, 1))(x, kernel)

    rows, split = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec('fsdp'))
    given = jax.device_put(x, rows), jax.device_put(kernel, split)
    program = jax.jit(gradients, out_shardings=(rows, (rows, split))).lower(*given).compile()
    out, (x_gradient, kernel_gradient) = program(*given)
    product = np.einsum('bd,dpe->bpe', x.astype(np.float64), kernel)
    for got, want in (
        (out, product),
        (x_gradient, 2 * np.einsum('bpe,dpe->bd', product, kernel)),
        (kernel_gradient, 2 * np.einsum('bd,bpe->dpe', x, product)),
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    gathered = sum(
        size for (kind, _), size in analyze(parse(program.as_text())).collectives.items() if 'gather' in kind
    )
    assert gathered < kernel.nbytes / 8


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
