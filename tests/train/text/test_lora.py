"""Low-rank updates of linear layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from support.goldens import relative_error
from train.text.lora import init_lora, merge_lora


def perturbed(params, seed: int = 9):
    return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(seed), leaf.shape), params)


def test_low_rank_updates():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    params = {'a': {'query': {'kernel': draw(6, 5)}, 'out': {'kernel': draw(5, 6)}}, 'norm': {'scale': draw(6)}}
    updates = init_lora(jax.random.key(0), params, 2, '(query)')
    assert jax.tree.map(jnp.shape, updates) == {'a': {'query': {'lora_down': (6, 2), 'lora_up': (2, 5)}}}
    # At the start nothing changes and only `up` has a gradient; later both have one.
    assert np.array_equal(merge_lora(params, updates, 3.0)['a']['query']['kernel'], params['a']['query']['kernel'])
    total = lambda updates: jnp.sum(jnp.sin(merge_lora(params, updates, 3.0)['a']['query']['kernel']))
    gradient = jax.grad(total)(updates)['a']['query']
    assert np.any(gradient['lora_up']) and not np.any(gradient['lora_down'])
    updates = perturbed(updates)
    merged, layer = merge_lora(params, updates, 3.0), updates['a']['query']
    want = params['a']['query']['kernel'] + 3 * layer['lora_down'] @ layer['lora_up']
    assert relative_error(merged['a']['query']['kernel'], want) < 1e-6
    assert merged['a']['out'] is not None and np.array_equal(merged['a']['out']['kernel'], params['a']['out']['kernel'])
    with pytest.raises(InputError, match="no linear layer is named '\\(querry\\)'; there are out, query"):
        init_lora(jax.random.key(0), params, 2, '(querry)')
    with pytest.raises(InputError, match=r'rank 5 does not suit a/query/kernel \[6, 5\]'):
        init_lora(jax.random.key(0), params, 5, 'query')
