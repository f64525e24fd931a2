"""Precision of the denoiser: the parts that stay float32 when the blocks compute in bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from neodragon_jax.models.mmdit import TIMESTEP_WIDTH, stack_blocks
from support.goldens import channels_last, load_golden, relative_error
from support.mmdit import inputs, model_and_params

CASE = 'u1_s1_b1'


@pytest.mark.parametrize('scan', [pytest.param(False, marks=pytest.mark.long), True])
def test_float32_streams_remove_most_of_the_rounding(scan):
    golden = load_golden('dit_a')
    model, params = model_and_params('dit_a')
    params = stack_blocks(params, model.config.num_layers) if scan else params
    half = model.clone(dtype=jnp.bfloat16, scan=scan)
    flow = lambda module: module.apply({'params': params}, *inputs(golden, CASE))
    want = channels_last(golden[f'{CASE}/out'])
    plain, streams = flow(half), flow(half.clone(residual_dtype=jnp.float32))
    assert (plain.dtype, streams.dtype) == (jnp.bfloat16, jnp.float32)
    assert 0 < relative_error(streams, want) < 0.7 * relative_error(plain, want)


def test_conditioning_asks_for_float32_products():
    """By default a TPU computes a float32 product from bfloat16 parts."""
    model, params = model_and_params('dit_a')
    sizes = model.config
    given = jnp.zeros((1, TIMESTEP_WIDTH)), jnp.zeros((1, sizes.pooled_projection_dim))
    half = model.clone(dtype=jnp.bfloat16)
    program = jax.make_jaxpr(lambda *given: half.apply({'params': params}, *given, method='modulate'))(*given)
    products = [equation for equation in equations(program.jaxpr) if equation.primitive.name == 'dot_general']
    assert len(products) >= 4 + sizes.num_layers
    for product in products:
        assert set(product.params['precision']) == {jax.lax.Precision.HIGHEST}
        assert all(operand.aval.dtype == jnp.float32 for operand in product.invars)


def equations(jaxpr):
    """Yield all equations of a program, those of its inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, 'eqns')):
            inner = getattr(inner, 'jaxpr', inner)
            if hasattr(inner, 'eqns'):
                yield from equations(inner)
