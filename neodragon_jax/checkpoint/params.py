"""Parameters of a component on the host, in the stored or a smaller type."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import traverse_util

from neodragon_jax.checkpoint import components as checkpoint

# Path components of parameters that stay in full precision: positions and the embeddings of timesteps, pooled vectors
# and sizes. They are used in float32, and an error in them shifts every token.
SENSITIVE = ('positions', 'position_bias', 'time_embed', 'pooled_embed', 'time_embedding', 'add_embedding')


def is_sensitive(path: tuple[str, ...], leaf: np.ndarray) -> bool:
    """Return True for parameters that keep their type: biases and scales of norms, which are small, and SENSITIVE."""
    # Biases of the modulation have two dimensions.
    return leaf.ndim < 2 or path[-1] == 'bias' or any(part in SENSITIVE for part in path)


def cast(
    params: dict[str, Any], dtype: Any, keep: Callable[[tuple[str, ...], np.ndarray], bool] = is_sensitive
) -> dict[str, Any]:
    """Return parameters in a smaller type, cast on the host before they are copied to a device.

    Args:
      params: of one component as `checkpoint.components.load` returns them, blocks not stacked.
      dtype: type to which wider parameters are cast; narrower ones are unchanged, as are all with None.
      keep: (path, parameter) -> whether the parameter keeps its type.
    """
    if dtype is None:
        return params
    dtype = np.dtype(dtype)
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(params))
    del params  # Each wide array is freed once its narrow copy exists, unless the caller holds a reference.
    for path, leaf in flat.items():
        if leaf.dtype.itemsize >= dtype.itemsize and not keep(path, leaf):
            flat[path] = leaf.astype(dtype, copy=False)
    return traverse_util.unflatten_dict(flat)


def read_params(folder: str | os.PathLike[str], dtype: Any, *names: str) -> dict[str, Any]:
    """Return the parameters of a component, or of some of its parts, as host arrays of the types that `cast` gives."""

    def parts() -> dict[str, Any]:
        _, params = checkpoint.load(folder)
        return {name: params[name] for name in names or params}

    return cast(parts(), dtype)
