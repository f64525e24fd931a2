"""Blocks gathered once: the same numbers, with less communication. test_whole_recipe.py has it in a whole step."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from neodragon_jax.config.neodragon import TINY
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.pyramid.history import envelope
from train.aot import cost, hlo
from train.dmd.gather import gather_blocks
from train.measure import blocks
from train.runtime.sharding import MeshConfig, batch_sharding, make_mesh, param_shardings

CALLS, BATCH = 3, 8


@functools.cache
def compiled(mesh_sizes: tuple[int, int, int], gather: bool):
    """Return a program that calls scanned blocks three times, with inputs on a mesh."""
    config = dataclasses.replace(TINY.denoiser, num_layers=4)
    layout = envelope(0, 2, 3, (4, 4), 4)
    mesh = make_mesh(MeshConfig(*mesh_sizes))
    run = blocks.gradient(PyramidMMDiT(config, jnp.bfloat16, scan=True), layout, forward=True)

    def calls(params, streams, *given):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            params = gather_blocks(params, jnp.bfloat16) if gather else params
            # One call after the other, as in a roll-out: the compiler must not share a gather among them.
            again = lambda scale, _: (run(params, tuple(scale.astype(x.dtype) * x for x in streams), *given) % 2, None)
            return jax.lax.scan(again, jnp.float32(1), length=CALLS)[0]

    rng = np.random.default_rng(0)
    params, *others = blocks.arguments(config, layout, BATCH)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.1, leaf.dtype)
    number = lambda leaf: jnp.ones(leaf.shape, leaf.dtype) if leaf.dtype == jnp.int32 else draw(leaf)
    params = jax.device_put(jax.tree.map(draw, params), param_shardings(mesh, params))
    rows = lambda leaf: batch_sharding(mesh, axis=leaf.shape.index(BATCH))
    others = [jax.tree.map(lambda leaf: jax.device_put(number(leaf), rows(leaf)), given) for given in others]
    return jax.jit(calls).lower(params, *others).compile(), (params, *others)


def gathered_bytes(program) -> float:
    collectives = cost.analyze(hlo.parse(program.as_text())).collectives
    return sum(size for (kind, _), size in collectives.items() if kind == 'all-gather')


@pytest.mark.parametrize('mesh', [(1, 8, 1), (2, 2, 2)])
def test_it_changes_no_number_and_gathers_once(mesh):
    (plain, given), (once, _) = compiled(mesh, gather=False), compiled(mesh, gather=True)
    assert np.isfinite(float(plain(*given)))
    assert float(once(*given)) == float(plain(*given))
    assert 0 < gathered_bytes(once) < gathered_bytes(plain) / (CALLS - 1)


def test_tensor_parts_stay_apart():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    config = dataclasses.replace(TINY.denoiser, num_layers=4)
    params = blocks.arguments(config, envelope(0, 2, 3, (4, 4), 4), BATCH)[0]

    def gather(params):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gather_blocks(params, jnp.bfloat16)

    given = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    result = jax.jit(gather)(jax.device_put(given, param_shardings(mesh, params)))
    kernel = result['blocks']['image_query']['kernel']
    assert isinstance(kernel.sharding, NamedSharding)
    assert kernel.dtype == jnp.bfloat16 and tuple(kernel.sharding.spec) == (None, None, 'tensor')
    assert result['blocks']['image_query']['bias'].dtype == jnp.float32
