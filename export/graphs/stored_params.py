"""Parameter readers of the export: as float32 regardless of the stored type, or from disk one block at a time."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.classes import COMPONENTS, class_name
from neodragon_jax.checkpoint.params import read_params


def read_float32(folder: str | os.PathLike[str], *names: str) -> dict[str, Any]:
    """Return the parameters of a component, or of its named parts, as float32 arrays on the host."""
    return to_float32(read_params(folder, np.float32, *names))


def to_float32(tree: Any) -> Any:
    """Convert a tree to float32 arrays on the host."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


def read_part(params: Mapping[str, Any], *prefixes: str) -> dict[str, Any]:
    """Return the parameters of a denoiser whose names start with a prefix, in float32.

    The position table is always included, because the module reads it in every call.
    """
    return {name: to_float32(params[name]) for name in params if name.startswith((*prefixes, 'positions'))}


class StoredParams(Mapping[str, Any]):
    """The parameters of a component folder by top-level name, such as `blocks_3`; read from disk on every access.

    Attributes:
      module: the Flax module, with its sizes from `config.json`.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Locate every tensor.

        Raises:
          InputError: as in `checkpoint.components.load`.
        """
        self.module = checkpoint.load_module(folder)
        self._weights = checkpoint.open_weights(folder, self.module)
        self._entries: dict[str, dict[str, Any]] = {}
        config = self.module.config  # pyright: ignore[reportAttributeAccessIssue]
        for entry in COMPONENTS[class_name(self.module)].entries(config):
            self._entries.setdefault(entry.path[0], {})[entry.torch_name] = entry

    def __getitem__(self, name: str) -> Any:
        """Read one subtree, in the stored types."""
        entries = self._entries[name]
        tensors = self._weights.read(entries)
        flat = {entries[torch_name].path: entries[torch_name].convert.to_flax(tensor) for torch_name, tensor in tensors}
        return traverse_util.unflatten_dict(flat)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
