"""Checksums of sharded arrays, equal on every mesh: damage of a checkpoint is found when it is restored.

The arrays of a checkpoint carry no checksum on disk. A sum of integers does not depend on their order, so every device
sums its own part, at the speed of its memory, and no array is gathered.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from train.runtime.sharding import path_name

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(tree: Any) -> dict[str, int]:
    """Return name -> checksum of the arrays of a tree, modulo 2^32; all processes of the mesh must call it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    values = jax.device_get(_checksums([leaf for _, leaf in leaves]))
    return {path_name(path): int(value) for (path, _), value in zip(leaves, values, strict=True)}


@jax.jit
def _checksums(leaves: list[Array]) -> list[UInt32[Array, '']]:
    """Return the checksums of all arrays.

    They are one program: several processes on CPUs may start the sums of many programs in different orders, and then
    wait for each other forever.
    """
    return [_checksum(leaf) for leaf in leaves]


def _checksum(array: Array) -> UInt32[Array, '']:
    """Return the sum of all numbers' bits, each times an odd factor that depends on its place.

    A change of one number therefore always changes the sum, and so does an exchange of two different ones, mostly.
    """
    array = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    place, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(array.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= array.shape[axis]
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)
