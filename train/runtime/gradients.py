"""Gradient accumulation: gradients of a large batch in the memory of a small one.

Legend: B rows of a batch, P parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from neodragon_jax.base.errors import InputError
from train.runtime.sharding import split_batch

Batch = Mapping[str, Array]
Loss = Callable[[Any, Batch, PRNGKeyArray], tuple[Float[Array, ''], Any]]


def value_and_grad(
    loss_of: Loss, params: Any, batch: Batch, key: PRNGKeyArray, parts: int = 1
) -> tuple[tuple[Float[Array, ''], Any], Any]:
    """Return ((loss, aux), gradient) of a batch, computed in several parts one after the other.

    Loss, aux and gradient are means over the parts. For a loss that is a mean over independent rows this is the loss of
    the whole batch. With one part this is `jax.value_and_grad(loss_of, has_aux=True)`. Several parts get different
    keys, so noise that must not depend on `parts` belongs in the batch. A NaN in one part makes the mean NaN.

    Part p holds rows p, p + P, p + 2 P ..., so that no rows move between devices.

    Args:
      loss_of: (params, batch, key) -> (loss, aux), aux a tree of arrays, such as metrics.
      batch: arrays [B, ...].
      parts: P, which divides B; activations take the memory of B / P rows.
    Raises:
      InputError: P does not divide B.
    """
    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    if parts == 1:
        return gradient_of(params, batch, key)
    rows = {array.shape[0] for array in batch.values()}
    if parts < 1 or len(rows) != 1 or max(rows) % parts:
        raise InputError(f'{parts} parts of a batch of {sorted(rows)} rows: choose parts that divide the batch.')

    def add(total: Any, inputs: tuple[Batch, PRNGKeyArray]) -> tuple[Any, None]:
        part, part_key = inputs
        value = gradient_of(params, split_batch(part), part_key)
        return jax.tree.map(lambda sum, new: sum + new.astype(sum.dtype), total, value), None

    inputs = {name: _in_parts(array, parts) for name, array in batch.items()}, jax.random.split(key, parts)
    shape = jax.eval_shape(gradient_of, params, jax.tree.map(lambda array: array[0], inputs[0]), key)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), shape)
    total, _ = jax.lax.scan(add, zero, inputs)
    return jax.tree.map(lambda sum, leaf: (sum / parts).astype(leaf.dtype), total, shape)


def _in_parts(array: Shaped[Array, 'B ...'], parts: int) -> Shaped[Array, 'P B/P ...']:
    """Return the rows assigned to the parts in turn."""
    dealt = array.reshape(-1, parts, *array.shape[1:])
    return split_batch(jnp.moveaxis(dealt, 1, 0), axis=1)
