"""Parameters of several modules in memory, one of them split over a mesh because it is too large for one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from neodragon_jax.generation.param_store import Store
from train.runtime.sharding import param_shardings, put


@dataclasses.dataclass
class ShardedStore(Store):
    """A store whose one module is split like a trained one; `place` puts the others on the devices.

    Attributes:
      mesh: of this process's devices.
      split: name of the module.
    """

    mesh: Mesh | None = None
    split: str = ''

    def read_module(self, name: str, read: Callable[[], dict[str, Any]]) -> Any:
        """Read a module onto the devices."""
        if self.mesh is None or name != self.split:
            return super().read_module(name, read)
        tree = read()
        return put(tree, param_shardings(self.mesh, tree))
