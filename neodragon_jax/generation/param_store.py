"""Parameters in memory: all modules from the start, or one at a time.

A `Store` returns the same values either way. With one module at a time, a program should finish all its work with a
module before it uses the next one; `phases.in_step` runs several tasks in this order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import traverse_util


@dataclasses.dataclass
class Store:
    """Parameters by module.

    Attributes:
      place: puts an array, or a tree of them, on the devices.
      one_at_a_time: read a module's parameters on request, after releasing those of the previous module.
      sizes: bytes of the parameters of every module that has been read.
    """

    place: Callable[[Any], Any] = jax.device_put
    one_at_a_time: bool = False
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    _held: dict[str, Any] = dataclasses.field(default_factory=dict)

    def hold(self, name: str, read: Callable[[], dict[str, Any]]) -> Callable[[], Any]:
        """Return a function that returns the parameters of a module, on the devices.

        Args:
          name: of the module, unique in this store.
          read: returns the parameters as a tree of NumPy arrays without other references.
        """

        def params() -> Any:
            if name not in self._held:
                if self.one_at_a_time:
                    self._held.clear()
                self._held[name] = self.read_module(name, read)
            return self._held[name]

        if not self.one_at_a_time:
            params()
        return params

    def read_module(self, name: str, read: Callable[[], dict[str, Any]]) -> Any:
        """Read a module; each host array is freed as soon as it has been copied to the devices."""
        leaves: dict[Any, Any] = dict(traverse_util.flatten_dict(read()))
        self.sizes[name] = sum(leaf.nbytes for leaf in leaves.values())
        for path in leaves:
            leaves[path] = self.place(leaves[path])
        return traverse_util.unflatten_dict(leaves)
