"""Rows of a rename table: one released tensor, one Flax parameter, and the exact map between them.

Every map is a permutation of numbers (transpose, reshape, reorder), so loading and saving a checkpoint reproduces it
byte for byte. Maps work on anything with the array interface of NumPy, including abstract JAX values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = Any


class Convert(NamedTuple):
    """Bijection between the released layout of one tensor and its Flax layout."""

    to_flax: Callable[[Array], Array]
    to_torch: Callable[[Array], Array]


class Entry(NamedTuple):
    """One parameter: its released name, its path in the Flax tree, and the map of its values."""

    torch_name: str
    path: tuple[str, ...]
    convert: Convert


SAME = Convert(lambda x: x, lambda x: x)
# Linear: torch [out, in], Flax [in, out].
LINEAR = Convert(lambda x: x.transpose(1, 0), lambda x: x.transpose(1, 0))
# Convolutions: torch [out, in, *window], Flax [*window, in, out].
CONV2D = Convert(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
CONV3D = Convert(lambda x: x.transpose(2, 3, 4, 1, 0), lambda x: x.transpose(4, 3, 0, 1, 2))


def reshaped(torch_shape: tuple[int, ...], flax_shape: tuple[int, ...]) -> Convert:
    """Return the map that only changes the shape."""
    return Convert(lambda x: x.reshape(flax_shape), lambda x: x.reshape(torch_shape))


def chain(first: Convert, second: Convert) -> Convert:
    """Return `first` followed by `second` (on the way to Flax)."""
    return Convert(lambda x: second.to_flax(first.to_flax(x)), lambda x: first.to_torch(second.to_torch(x)))


def permuted(order: np.ndarray, axis: int) -> Convert:
    """Return the map that reorders one axis: flax[i] = released[order[i]]."""
    inverse = np.argsort(order)

    def take(x: Array, index: np.ndarray) -> Array:
        return x[(slice(None),) * (axis % x.ndim) + (index,)]

    return Convert(lambda x: take(x, order), lambda x: take(x, inverse))


def dense(torch_prefix: str, path: tuple[str, ...], bias: bool = True, weight: Convert = LINEAR) -> list[Entry]:
    """Return the entries of a linear or convolution layer: `weight` -> `kernel`, `bias` -> `bias`."""
    rows = [Entry(f'{torch_prefix}.weight', (*path, 'kernel'), weight)]
    return rows + [Entry(f'{torch_prefix}.bias', (*path, 'bias'), SAME)] * bias


def norm(torch_prefix: str, path: tuple[str, ...], bias: bool = True) -> list[Entry]:
    """Return the entries of a norm layer: `weight` -> `scale`, `bias` -> `bias`."""
    rows = [Entry(f'{torch_prefix}.weight', (*path, 'scale'), SAME)]
    return rows + [Entry(f'{torch_prefix}.bias', (*path, 'bias'), SAME)] * bias
