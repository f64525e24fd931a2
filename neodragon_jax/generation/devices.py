"""Placement of parameters and batches on the devices of a process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Spread:
    """Placement of arrays: parameters replicated on every device, batches split along their first axis."""

    devices: Sequence[Any]  # of jax.Device

    def _put(self, tree: Any, *spec: str) -> Any:
        mesh = Mesh(np.array(self.devices), ('batch',))
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))

    def replicate(self, tree: Any) -> Any:
        """Copy a tree to every device."""
        return self._put(tree)

    def shard(self, tree: Any) -> Any:
        """Split a tree along its leading axis, whose length is a multiple of the number of devices."""
        return self._put(tree, 'batch')
