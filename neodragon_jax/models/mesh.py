"""Sharding of activations on a device mesh: the batch over devices, the heads over tensor groups.

The partitioner shards activations automatically, but in the backward pass of a scan over blocks it may replicate the
batch, so that every device holds all activations. Without a mesh, these functions have no effect.
Source: arXiv 2105.04663 (GSPMD), section 3.
"""

from __future__ import annotations

import math
from typing import TypeVar

import jax
from jax.sharding import AxisType, PartitionSpec

Tree = TypeVar('Tree')

# The mesh axis that splits heads; all others split the batch.
HEADS_AXIS = 'tensor'


def batch_axes() -> tuple[str, ...]:
    """Return the axes of the current mesh that split the batch; none without a mesh or for axes mapped manually."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if name != HEADS_AXIS and kind is AxisType.Auto)


def keep_batch_split(activations: Tree) -> Tree:
    """Return activations whose first axis is split over the mesh's batch axes.

    Args:
      activations: tree of arrays [B, ...] on a mesh. A batch that the axes do not divide is left to the partitioner.
    """
    axes = batch_axes()
    if not axes:
        return activations
    sizes = jax.sharding.get_abstract_mesh().shape
    parts = math.prod(sizes[name] for name in axes)

    def pin(x: jax.Array) -> jax.Array:
        return x if x.shape[0] % parts else jax.lax.with_sharding_constraint(x, PartitionSpec(axes))

    return jax.tree.map(pin, activations)
