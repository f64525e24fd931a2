"""Motion of clips whose captions omit it: displacement by unit, and variety of direction.

A few-step student fails in two ways that attributes of a caption cannot show. With its own frames as history it may
lose the motion, unit after unit; and for one caption it may always choose the same direction, the mean of what it saw.

* Displacement of a unit: the way of the shape within the unit's frames, between its first, middle and last frame, in
  sides. Without a shape in some frame of the clip there is no track, and it counts as 0.
* Heading: the direction of the displacement before the first turn, as a unit vector; (0, 0) without a track or motion.
* Variety of direction: 1 - the mean of h_i . h_j over all pairs of clips of one caption, averaged over captions. It is
  1 for independent, uniform directions, and 0 if a caption always gives the same.
* Spread of displacement: the variance of the displacement vectors over the clips of a caption, averaged over captions.
  A mean of many directions is short but still points somewhere: it loses spread, not variety.

Legend: T frames, U units, N clips.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from train.shapes.masks import track_of

# Frames of a unit > 0, and the shortest displacement that has a direction, in sides.
FRAMES_PER_UNIT = 8
STILL = 0.01


class Motion(NamedTuple):
    """The motion of one clip.

    Attributes:
      displacement: of every unit > 0, in sides.
      heading: unit vector x, y, or zeros.
    """

    displacement: Float[np.ndarray, ' U']
    heading: Float[np.ndarray, ' 2']


def motion_of(video: UInt8[np.ndarray, 'T H W 3'], steady: float) -> Motion:
    """Return the motion of a clip.

    Args:
      steady: share of the clip before the first turn, see `World.steady`.
    """
    track = track_of(video)
    if track is None:
        return Motion(np.zeros((len(video) - 1) // FRAMES_PER_UNIT), np.zeros(2))
    return Motion(displacements(track), heading(track, steady))


def displacements(track: Float[np.ndarray, 'T 2']) -> Float[np.ndarray, ' U']:
    """Return the displacement of every unit > 0, in the track's unit of length."""
    knots = track[:: FRAMES_PER_UNIT // 2]
    ways = np.linalg.norm(np.diff(knots, axis=0), axis=1)
    return ways[: len(ways) // 2 * 2].reshape(-1, 2).sum(axis=1)


def heading(track: Float[np.ndarray, 'T 2'], steady: float) -> Float[np.ndarray, ' 2']:
    """Return the heading before the first turn; zeros where the shape hardly moves."""
    way = track[int((len(track) - 1) * steady)] - track[0]
    length = np.linalg.norm(way)
    return way / length if length >= STILL else np.zeros(2)


def variety(headings: Float[np.ndarray, 'N 2'], captions: Sequence[Hashable]) -> float:
    """Return the variety of direction; NaN if no caption has two clips.

    Args:
      captions: of each clip: clips with equal entries are compared.
    """
    values = []
    for vectors in _by_caption(headings, captions):
        count, products = len(vectors), vectors @ vectors.T
        values.append(1 - (products.sum() - np.trace(products)) / (count * (count - 1)))
    return float(np.mean(values)) if values else float('nan')


def spread(ways: Float[np.ndarray, 'N 2'], captions: Sequence[Hashable]) -> float:
    """Return the spread of displacement, in the square of the unit of `ways`; NaN if no caption has two clips.

    Args:
      ways: displacement of each clip before the first turn.
      captions: as in `variety`.
    """
    values = [vectors.var(axis=0, ddof=1).sum() for vectors in _by_caption(ways, captions)]
    return float(np.mean(values)) if values else float('nan')


def _by_caption(vectors: Float[np.ndarray, 'N 2'], captions: Sequence[Hashable]) -> list[Float[np.ndarray, '_ 2']]:
    """Return the vectors of every caption that has at least two clips."""
    groups: dict[Hashable, list[np.ndarray]] = collections.defaultdict(list)
    for vector, caption in zip(vectors, captions, strict=True):
        groups[caption].append(vector)
    return [np.stack(group) for group in groups.values() if len(group) > 1]
