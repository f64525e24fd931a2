"""Gather the student once for all uses in an iteration that do not differentiate it.

The blocks' kernels are split over `fsdp`, and every pass of the scan gathers them block by block. Roll-outs and the
examples of the fake model's updates make many such passes over the same student.
"""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import PartitionSpec

from train.runtime.sharding import FSDP, path_name, rule_of

_KERNEL = re.compile(r'^blocks/.*kernel$')


def gather_blocks(params: Any, dtype: Any) -> Any:
    """Return parameters whose block kernels are in the compute type and whole along `fsdp`; the others are unchanged.

    The blocks cast these kernels to their compute type themselves, so their results are the same. A device holds all
    of them until their last use. Outside a step, nothing is moved.

    Args:
      params: of `PyramidMMDiT`, with scanned blocks.
      dtype: compute type of the blocks; None keeps the stored one.
    """
    on_mesh = not jax.sharding.get_abstract_mesh().empty

    def gathered(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        if not _KERNEL.search(name):
            return leaf
        leaf = leaf if dtype is None else leaf.astype(dtype)
        axes = tuple(None if axis == FSDP else axis for axis in rule_of(name) or ())
        spec = PartitionSpec(*(None,) * (leaf.ndim - len(axes)), *axes)
        return jax.lax.with_sharding_constraint(leaf, spec) if on_mesh else leaf

    return jax.tree_util.tree_map_with_path(gathered, params)
