"""A second reader of a clip's shape, which shares no code with `train.shapes.attributes`.

The first reader lays drawn templates over a mask. This one draws nothing:

* Every pixel has the nearest named color. The background is the most frequent one, the shape the next.
* Mask: the pixels that are nearer to the median color of the shape than to that of the background.
* Fill: the share of the mask's bounding box that the mask covers, the median over compared frames. A square fills 1, a
  circle pi / 4, a triangle 1 / 2; the nearest is read. The box ends, seen from the fullest row and column, at the first
  that holds less than a tenth of it, so that specks do not enlarge it.

Legend: T frames, H W pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from train.shapes.world import COLORS

FILLS = {'circle': math.pi / 4, 'square': 1.0, 'triangle': 0.5}
# Compared frames, evenly spaced; the smallest share of the picture that is a shape; the share of a rim.
COMPARED, SMALLEST, RIM = 9, 0.01, 0.1


class Filled(NamedTuple):
    """What the second reader sees: names, None without a shape."""

    color: str | None
    shape: str | None


def read_fill(video: UInt8[np.ndarray, 'T H W 3']) -> Filled:
    """Return color and shape of a clip."""
    frames = np.linspace(0, len(video) - 1, min(COMPARED, len(video))).round().astype(int)
    pixels = video[frames].astype(np.float32)
    names = tuple(COLORS)
    distances = [np.square(pixels - np.array(COLORS[name], np.float32)).sum(axis=-1) for name in names]
    nearest = np.argmin(distances, axis=0)
    counts = np.bincount(nearest.ravel(), minlength=len(names))
    behind, color = np.argsort(counts)[::-1][:2]
    if counts[color] < SMALLEST * nearest.size:
        return Filled(None, None)
    far, near = (
        np.square(pixels - np.median(pixels[nearest == name], axis=0)).sum(axis=-1) for name in (behind, color)
    )
    fills = [_fill(mask) for mask in near < far if mask.any()]
    if not fills:
        return Filled(names[color], None)
    fill = float(np.median(np.array(fills)))
    return Filled(names[color], min(FILLS, key=lambda shape: abs(FILLS[shape] - fill)))


def _fill(mask: Bool[np.ndarray, 'H W']) -> float:
    """Return the share of its bounding box that a mask covers."""
    rows, columns = (_inside(mask.sum(axis=axis)) for axis in (1, 0))
    return float(mask[rows, columns].mean())


def _inside(counts: Float[np.ndarray, ' N']) -> slice:
    """Return the range of rows or columns around the fullest one."""
    most = int(np.argmax(counts))
    empty = np.flatnonzero(counts < RIM * counts[most])
    before, after = empty[empty < most], empty[empty > most]
    return slice(int(before[-1]) + 1 if len(before) else 0, int(after[0]) if len(after) else len(counts))
