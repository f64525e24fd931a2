"""Attributes of clips of moving shapes, read from the pixels without any learned model, and compared to the caption.

The rules, with b(t) the median color of frame t's border and lengths in sides (see `train.shapes.world`):

* Background: the named color nearest to the median of all borders.
* Shape color: c is the median over pixels that differ most from b(t); the named color nearest to c. Where no pixel
  differs by 40 levels there is no shape, and nothing else is read.
* Mask: the share m = (p - b) . (c - b) / |c - b|^2 of each pixel p, stretched: clip(2 m - 1/2, 0, 1), so that weak
  noise is ignored.
* Size: the named size whose radius is nearest to that of a circle with the mask's area.
* Shape: the one whose drawn template of the mask's area, laid over the mask where it fits best, differs least from it.
* Steady: 1 if the same template differs least from the mask in all compared frames, else 0.
* Mismatch: area by which mask and template of the expected shape and size differ, over that of the template; 1 for a
  blank picture. Drawn clips have about 0.02.
* Track: the center of mass in each frame, of the shares at most 3 pixels from the mask's core: squares of 3x3 pixels in
  it, which specks lack. If a frame has no core, there is no track, and nothing of the following is read.
* Direction: that of the displacement, if it is within 27 degrees of one, while the caption's direction surely holds
  (all of the clip in a world without turns).
* Speed: that whose displacement in this time is nearest.
* Motion: the displacement along the expected direction in this time, over the true one: 1 as drawn, 0 for a still,
  negative for the opposite direction.
* Path: the length of the whole way of the center, sideways moves and turns included, over the true one.

Legend: T frames, N compared frames, H W pixels.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from neodragon_jax.base.errors import InputError
from neodragon_jax.evaluation import clip_metrics as metrics
from train.shapes.drawing import coverage
from train.shapes.masks import Mask, border_colors, centers_of_mass, find_shape, stretched, track_of_mask
from train.shapes.world import COLORS, DIRECTIONS, REACHES, SIZES, SPEEDS, Traits, World

# A value is read only if the clip is at most this factor away from it, in radius or displacement.
TOLERANCE = 1.5
# A shape is read only if its template differs from the mask by at most this.
WORST_MISMATCH = 0.75
# Frames whose shape is compared, and knots between which a path is measured, evenly spaced.
COMPARED, KNOTS = 9, 13


class Attributes(NamedTuple):
    """The attributes that a clip shows, compared to its caption; None where one cannot be read.

    Attributes:
      expected: the caption's attributes.
      size ... background: the attributes read from the clip.
      steady, mismatch, motion, path: see the module's docstring; 0, 1, 0 and 0 without a shape.
      flicker, saturation: see `neodragon_jax.evaluation.clip_metrics`.
    """

    expected: Traits
    size: str | None
    color: str | None
    shape: str | None
    direction: str | None
    speed: str | None
    background: str | None
    steady: float
    mismatch: float
    motion: float
    path: float
    flicker: float
    saturation: float

    def correct(self) -> dict[str, bool]:
        """Return whether each attribute is the caption's."""
        return {name: getattr(self, name) == getattr(self.expected, name) for name in Traits._fields}


class Estimate(NamedTuple):
    """A mean over clips, and its standard error (not a number for a single clip or cluster)."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f'{self.mean:.3f}' if math.isnan(self.error) else f'{self.mean:.3f} ± {self.error:.3f}'


# Attributes that are numbers, in the order of tables.
NUMBERS = ('steady', 'mismatch', 'motion', 'path', 'flicker', 'saturation')


def measure(video: UInt8[np.ndarray, 'T H W 3'], expected: Traits, world: World) -> Attributes:
    """Read the attributes of a clip.

    Args:
      expected: the caption's attributes, see `train.shapes.captions.parse`.
      world: the world of the clip, which defines the possible values and turns.
    Raises:
      InputError: the clip is not RGB bytes, or too short or too small, or its caption is not of this world.
    """
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
        raise InputError(f'video: got {video.dtype} {list(video.shape)}; give RGB bytes, uint8 [T, H, W, 3].')
    frames, height, width, _ = video.shape
    # Flicker needs three frames, and a direction two before the first turn.
    least = max(metrics.MIN_FRAMES, world.turns + 2)
    if frames < least or min(height, width) < metrics.BLOCK:
        raise InputError(f'video: {frames} frames of {height}x{width}; give at least {least} of 16x16 pixels.')
    world.numbers(expected)
    pixels = video.astype(np.float32)
    backgrounds = border_colors(pixels)
    common = {
        'expected': expected,
        'background': _nearest_color(np.median(backgrounds, axis=0)),
        'flicker': metrics.flicker(pixels.mean(axis=-1)),
        'saturation': metrics.saturation(video),
    }
    found = find_shape(pixels, backgrounds)
    if found is None:
        nothing = dict.fromkeys(('size', 'color', 'shape', 'direction', 'speed'))
        return Attributes(**common, **nothing, steady=0.0, mismatch=1.0, motion=0.0, path=0.0)  # pyright: ignore[reportArgumentType]
    share, color = found
    side, mask = min(height, width), stretched(share)
    radius = math.sqrt(float(np.median(mask.sum(axis=(1, 2)))) / math.pi) / side
    mismatches = {shape: _mismatches(mask, shape, radius * side) for shape in world.shapes}
    means = {shape: float(values.mean()) for shape, values in mismatches.items()}
    best = min(means, key=means.__getitem__)
    return Attributes(
        **common,  # pyright: ignore[reportArgumentType]
        **_movement(share, expected, world),
        size=_nearest(radius, {word: SIZES[word] for word in world.sizes}),
        color=_nearest_color(color),
        shape=best if means[best] <= WORST_MISMATCH else None,
        steady=float(np.ptp(np.argmin(np.stack(list(mismatches.values())), axis=0)) == 0),
        mismatch=float(_mismatches(mask, expected.shape, SIZES[expected.size] * side).mean()),
    )


def _nearest_color(color: Float[np.ndarray, ' 3']) -> str:
    return min(COLORS, key=lambda name: float(np.square(color - np.array(COLORS[name])).sum()))


def _movement(share: Mask, expected: Traits, world: World) -> dict[str, Any]:
    """Return direction, speed, motion and path, read from the track of the shape."""
    centers = track_of_mask(share)
    if centers is None:
        return {'direction': None, 'speed': None, 'motion': 0.0, 'path': 0.0}
    steady = centers[: 1 + (len(share) - 1) // (world.turns + 1)]
    time = (len(steady) - 1) / (len(share) - 1)
    displacement = _displacement(steady)
    direction = _direction(displacement, min(SPEEDS[word] for word in world.speeds) * time)
    speeds = {word: SPEEDS[word] * time for word in world.speeds}
    return {
        'direction': direction,
        'speed': _nearest(float(np.abs(displacement).max()), speeds) if direction else None,
        'motion': float(displacement @ DIRECTIONS[expected.direction]) / speeds[expected.speed],
        'path': _path(centers) / SPEEDS[expected.speed],
    }


def _displacement(centers: Float[np.ndarray, 'T 2']) -> Float[np.ndarray, ' 2']:
    """Return the displacement from the first to the last frame, of the straight line that fits best."""
    time = np.linspace(-0.5, 0.5, len(centers))
    return time @ centers / np.square(time).sum()


def _direction(displacement: Float[np.ndarray, ' 2'], least: float) -> str | None:
    """Return the direction of a displacement, or None if it is oblique or shorter than a quarter of the shortest."""
    along = {name: float(displacement @ step) for name, step in DIRECTIONS.items()}
    best = max(along, key=along.__getitem__)
    oblique = np.abs(displacement).min() > along[best] / 2
    return None if oblique or along[best] < least / 4 else best


def _nearest(value: float, values: Mapping[str, float]) -> str | None:
    """Return the word whose value is nearest by its ratio, if that is within the tolerance."""
    ratio = {word: max(value / known, known / max(value, 1e-9)) for word, known in values.items()}
    best = min(ratio, key=ratio.__getitem__)
    return best if ratio[best] <= TOLERANCE else None


def _path(centers: Float[np.ndarray, 'T 2']) -> float:
    """Return the length of the way between evenly spaced knots, in steps along x and y, which turns do not shorten."""
    knots = np.linspace(0, len(centers) - 1, min(KNOTS, len(centers))).round().astype(int)
    return float(np.abs(np.diff(centers[knots], axis=0)).sum())


def _mismatches(mask: Mask, shape: str, radius: float) -> Float[np.ndarray, ' N']:
    """Return the area by which mask and best aligned template differ, over the template's, in N compared frames."""
    _, height, width = mask.shape
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    shown = np.linspace(0, len(mask) - 1, min(COMPARED, len(mask))).round().astype(int)

    def template(center: Sequence[float]) -> Float[np.ndarray, 'H W']:
        return stretched(coverage(shape, radius, (x - center[0])[None, :], (y - center[1])[:, None]))

    # Where the correlation of mask and template is largest, to whole pixels; other blobs do not disturb it.
    origin = (width // 2 + 0.5, height // 2 + 0.5)
    spectrum = np.conj(np.fft.rfft2(np.roll(template(origin), (-(height // 2), -(width // 2)), (0, 1))))
    reach = math.ceil(max(REACHES[shape]) * radius) + 2
    results = []
    for frame in mask[shown]:
        fit = np.fft.irfft2(np.fft.rfft2(frame) * spectrum, s=frame.shape)
        row, column = np.unravel_index(int(np.argmax(fit)), fit.shape)
        coarse = (float(column) + 0.5, float(row) + 0.5)
        # Then align the centers of mass around that position, at subpixel precision.
        near = frame * (np.abs(x - coarse[0]) <= reach)[None, :] * (np.abs(y - coarse[1]) <= reach)[:, None]
        fine = centers_of_mass(near[None])[0]
        results.append(min(_difference(frame, template(center)) for center in (coarse, fine)))
    return np.array(results)


def _difference(mask: Float[np.ndarray, 'H W'], template: Float[np.ndarray, 'H W']) -> float:
    return float(np.abs(mask - template).sum() / max(template.sum(), 1e-6))


def columns(clips: Sequence[Attributes]) -> dict[str, list[float]]:
    """Return of every clip whether each attribute is right, whether all are (1 or 0), and the numbers.

    Raises:
      InputError: there is no clip.
    """
    if not clips:
        raise InputError('there are no clips to summarize; measure at least one.')
    right = [clip.correct() for clip in clips]
    found = {name: [float(row[name]) for row in right] for name in Traits._fields}
    found['all'] = [float(all(row.values())) for row in right]
    return found | {name: [float(getattr(clip, name)) for clip in clips] for name in NUMBERS}


def summarize(clips: Iterable[Attributes], clusters: Sequence[Hashable] | None = None) -> dict[str, Estimate]:
    """Return the share of clips with each attribute right, with all right, and the means of the numbers.

    Args:
      clusters: of each clip, such as its combination of attributes; clips of one cluster are not independent. None: all
        clips are.
    Raises:
      InputError: there is no clip.
    """
    clips = list(clips)
    clusters = range(len(clips)) if clusters is None else clusters
    return {name: estimate(np.array(values), clusters) for name, values in columns(clips).items()}


def estimate(values: Float[np.ndarray, ' N'], clusters: Sequence[Hashable]) -> Estimate:
    """Return the mean and its cluster-robust standard error.

    error^2 = G / (G - 1) sum over clusters g of (sum over i in g of (v_i - mean))^2 / N^2, the usual error of a
    mean where every value is a cluster of its own.
    """
    mean = float(values.mean())
    sums: dict[Hashable, float] = collections.defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += float(value) - mean
    count = len(sums)
    square = sum(value**2 for value in sums.values())
    return Estimate(mean, math.sqrt(count / (count - 1) * square) / len(values) if count > 1 else math.nan)


def markdown_table(summaries: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Return a Markdown table with a row per summary, such as of the truth, the teacher and the student."""
    names = list(next(iter(summaries.values())))
    head = [f'| clips | {" | ".join(names)} |', f'|---{"|---:" * len(names)}|']
    rows = [f'| {title} | {" | ".join(str(table[name]) for name in names)} |' for title, table in summaries.items()]
    return '\n'.join([*head, *rows])
