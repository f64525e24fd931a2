"""Sharding of activations on a device mesh: the batch over devices, the heads over tensor groups.

The partitioner shards activations automatically, but in the backward pass of a scan over blocks it may replicate the
batch, so that every device holds all activations. Without a mesh, these functions have no effect.
Source: arXiv 2105.04663 (GSPMD), section 3.
"""

from __future__ import annotations

import itertools
import math
from typing import TypeVar

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

Tree = TypeVar('Tree')

# The mesh axis that splits heads; all others split the batch. That of parameters also splits the input dimension of the
# modulation's kernels.
HEADS_AXIS, PARAMETERS_AXIS = 'tensor', 'fsdp'


def batch_axes(rows: int) -> tuple[str, ...]:
    """Return the axes of the current mesh that split a batch: of those whose product divides it, the most devices.

    It is () without a mesh, and for axes mapped manually.

    Args:
      rows: size of the batch. A part of a batch, such as a few roll-outs, may be split over fewer axes than the batch.
    """
    axes, sizes = _automatic_axes(), jax.sharding.get_abstract_mesh().shape
    parts = lambda chosen: math.prod(sizes[name] for name in chosen)
    subsets = (chosen for count in range(len(axes) + 1) for chosen in itertools.combinations(axes, count))
    return max((chosen for chosen in subsets if rows % parts(chosen) == 0), key=lambda chosen: (parts(chosen), chosen))


def _automatic_axes() -> tuple[str, ...]:
    """Return all axes of the current mesh that may split a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if name != HEADS_AXIS and kind is AxisType.Auto)


def keep_batch_split(activations: Tree) -> Tree:
    """Return activations whose first axis is split over the mesh's batch axes.

    Args:
      activations: tree of arrays [B, ...] on a mesh. A batch that no axis divides is left to the partitioner.
    """

    def pin(x: jax.Array) -> jax.Array:
        axes = batch_axes(x.shape[0])
        return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x

    return jax.tree.map(pin, activations)


def split_inputs(x: Float[Array, 'B D']) -> Float[Array, 'B D']:
    """Return the inputs of a product split like its kernel [D, ...]: features over the axis that splits parameters.

    Each device then multiplies its own part of the kernel, and the sums are exchanged. For a large kernel and a small
    batch that is far less than the kernel, which the partitioner gathers on some meshes.
    """
    axes, sizes = _automatic_axes(), jax.sharding.get_abstract_mesh().shape
    rows = tuple(name for name in axes if name != PARAMETERS_AXIS)
    if rows == axes or x.shape[0] % math.prod(sizes[name] for name in rows) or x.shape[1] % sizes[PARAMETERS_AXIS]:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, PARAMETERS_AXIS))
