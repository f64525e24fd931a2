"""Parameters as export reads them: in float32 whatever type they are stored in, or from disk one block at a time."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
from flax import traverse_util

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.params import read_params


def read_float32(folder: str | os.PathLike[str], *names: str) -> dict[str, Any]:
    """Return the parameters of a component as float32 arrays on the host: all, or those of some parts."""
    return to_float32(read_params(folder, np.float32, *names))


def to_float32(tree: Any) -> Any:
    """Return a tree of float32 arrays on the host."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


def read_part(params: Mapping[str, Any], *prefixes: str) -> dict[str, Any]:
    """Return the parameters of a denoiser whose names start with a prefix, in float32.

    The table of positions is always included: the module looks it up in every call.
    """
    return {name: to_float32(params[name]) for name in params if name.startswith((*prefixes, 'positions'))}


class StoredParams(Mapping[str, Any]):
    """The parameters of a component folder by their first name, such as `blocks_3`; nothing read is kept.

    Attributes:
      module: the Flax module, with its sizes from `config.json`.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Look up where every tensor is.

        Raises:
          InputError: as in `checkpoint.load`; shapes are not checked.
        """
        self.module = checkpoint.load_module(folder)
        component = checkpoint.COMPONENTS[checkpoint.class_name(self.module)]
        self._paths: dict[str, pathlib.Path] = {}
        for path in checkpoint.weight_paths(folder):
            try:
                with safetensors.safe_open(path, framework='numpy') as file:
                    self._paths |= dict.fromkeys(file.keys(), path)
            except (safetensors.SafetensorError, OSError) as error:
                raise InputError(f'{path}: truncated or not a safetensors file ({error}). Copy it again.') from None
        self._entries: dict[str, list[Any]] = {}
        for entry in component.names(self.module.config):  # pyright: ignore[reportAttributeAccessIssue]
            if entry.torch_name not in self._paths:
                raise InputError(
                    f'{folder}: tensor {entry.torch_name} is missing for the sizes in its config.json. '
                    'Weights and config belong to different models; copy the folder again.'
                )
            self._entries.setdefault(entry.path[0], []).append(entry)

    def __getitem__(self, name: str) -> Any:
        """Read one subtree, in the stored types."""
        flat = {}
        for entry in self._entries[name]:
            with safetensors.safe_open(self._paths[entry.torch_name], framework='numpy') as file:
                flat[entry.path] = entry.convert.to_flax(file.get_tensor(entry.torch_name))
        return traverse_util.unflatten_dict(flat)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
