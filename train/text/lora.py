"""Low-rank updates of linear layers: kernel + scale * down @ up, with only `down` and `up` trained.

Source: LoRA, arXiv 2106.09685.
Legend: I inputs, O outputs, R rank, N blocks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import PRNGKeyArray

from neodragon_jax.base.errors import InputError
from train.runtime.settings import check_range
from train.runtime.sharding import path_name

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank updates of a module; each kind of module has a subclass with its defaults.

    Attributes:
      rank: R, rank of the updates.
      alpha: numerator of the scale of the updates, alpha / rank.
      layers: regular expression of the linear layers' names.
    """

    LEAST_RANK: ClassVar[int] = 1

    rank: int
    alpha: float = 16.0
    layers: str

    def __post_init__(self) -> None:
        check_range(self, 'rank', least=self.LEAST_RANK)

    def init(self, key: PRNGKeyArray, params: Params, stacked: Collection[str] = ()) -> dict[str, Any]:
        """Return updates that do not change the parameters, see `init_lora`."""
        return init_lora(key, params, self.rank, self.layers, stacked)

    def merge(self, params: Params, updates: Params) -> dict[str, Any]:
        """Return parameters with the updates added, see `merge_lora`."""
        return merge_lora(params, updates, self.alpha / self.rank)


def init_lora(
    key: PRNGKeyArray, params: Params, rank: int, layers: str, stacked: Collection[str] = ()
) -> dict[str, Any]:
    """Return updates for the kernels [I, O] that `layers` selects: down [I, R] random, up [R, O] zero.

    The layers are unchanged at the start. Kernels of blocks stacked for a scan, [N, I, O], get updates of every block.

    Args:
      params: parameters of a module, arrays or abstract arrays.
      layers: a regular expression for the last parts of a layer's path, such as '(query|value)'.
      stacked: top-level names of stacked blocks.
    Raises:
      InputError: the expression selects no layer, or the rank is not below the size of a layer.
    """
    pattern = re.compile(f'(^|/){layers}/kernel$')
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(dict(params)))
    axes = lambda path: 3 if path[0] in stacked else 2
    named = [path for path in flat if pattern.search('/'.join(path))]
    chosen = [path for path in named if len(flat[path].shape) == axes(path)]
    if not chosen:
        raise InputError(f'no linear layer is named {layers!r}; there are {_layer_names(flat)}.')
    updates: dict[Any, Any] = {}
    for path, path_key in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        *blocks, inputs, outputs = flat[path].shape
        if not 1 <= rank < min(inputs, outputs):
            raise InputError(f'rank {rank} does not suit {"/".join(path)} {[inputs, outputs]}; choose a smaller one.')
        updates[(*path[:-1], 'lora_down')] = jax.random.normal(path_key, (*blocks, inputs, rank)) * inputs**-0.5
        updates[(*path[:-1], 'lora_up')] = jnp.zeros((*blocks, rank, outputs))
    return traverse_util.unflatten_dict(updates)


def merge_lora(params: Params, updates: Params, scale: float) -> dict[str, Any]:
    """Return parameters with the updates added to their kernels, in float32; other parameters are unchanged."""
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(dict(params)))
    low_rank: dict[Any, Any] = dict(traverse_util.flatten_dict(dict(updates)))
    for (*layer, name), down in low_rank.items():
        if name == 'lora_down':
            change = scale * down @ low_rank[(*layer, 'lora_up')]
            flat[(*layer, 'kernel')] = flat[(*layer, 'kernel')].astype(jnp.float32) + change
    return traverse_util.unflatten_dict(flat)


def named_tensors(updates: Params) -> dict[str, Any]:
    """Return the updates by path, in the layout of a safetensors file."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(dict(updates))}


def _layer_names(flat: Mapping[Any, Any]) -> str:
    """Return the names of all linear layers."""
    return ', '.join(sorted({path[-2] for path, leaf in flat.items() if path[-1] == 'kernel' and len(leaf.shape) == 2}))
