"""Metrics of a clip without a reference and without a model: motion, flicker, sharpness, saturation.

They detect frozen, pulsing, blurred or washed-out videos and serve to compare two checkpoints; they do not measure the
content of a video. Luma is the mean of R, G and B, in gray levels 0..255.

Legend: T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from neodragon_jax.base.errors import InputError

# Motion: side of the tracked squares, and the search range along each axis, in pixels.
BLOCK, REACH = 16, 8
# Number of frame pairs, evenly spaced, that motion is measured on: tracking every pair takes seconds per clip.
PAIRS = 12
# Minimum reduction of the difference for a displacement to count: relative, because the best of many matches of pure
# noise reduces it by a seventh, and in gray levels per pixel, because of compression.
SHARE, LEVELS = 0.25, 1.0

Luma = Float[np.ndarray, 'T H W']


class ClipMetrics(NamedTuple):
    """Metrics of one clip, or their means; see the functions of the same names."""

    motion: float
    flicker: float
    sharpness: float
    saturation: float


UNITS = ClipMetrics('px/frame', 'levels', 'levels', '0..1')  # pyright: ignore[reportArgumentType]
MIN_FRAMES = 3
MIN_SIDE = BLOCK + 2 * REACH


def measure(frames: UInt8[np.ndarray, 'T H W 3']) -> ClipMetrics:
    """Return the metrics of a clip.

    Raises:
      InputError: the frames are not RGB bytes, or too few or too small to be measured.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise InputError(f'frames: got {frames.dtype} {list(frames.shape)}; give RGB bytes, uint8 [T, H, W, 3].')
    count, height, width, _ = frames.shape
    if count < MIN_FRAMES or min(height, width) < MIN_SIDE:
        raise InputError(
            f'frames: {count} of {height}x{width}; give at least {MIN_FRAMES} of {MIN_SIDE}x{MIN_SIDE} pixels.'
        )
    red, green, blue = np.moveaxis(frames, -1, 0)
    luma = (red.astype(np.float32) + green + blue) / 3
    return ClipMetrics(motion(luma), flicker(luma), sharpness(luma), saturation(frames))


def motion(luma: Luma) -> float:
    """Measure the displacement of the picture's parts, in pixels per frame.

    For two successive frames a and b, every 16x16 square s of a is tracked to

        d(s) = argmin over |dx|, |dy| <= 8 of sum over s of |a(x, y) - b(x + dx, y + dy)|,

    the shortest in a tie, and 0 unless the sum is smaller than at d = 0 by a quarter and by a gray level per pixel.
    The result is the mean of |d| over the squares whose neighborhood lies inside the frame, and over at most 12 evenly
    spaced pairs.
    """
    pairs = np.unique(np.linspace(0, len(luma) - 2, PAIRS).round().astype(int))
    return float(np.mean([_displacements(luma[index], luma[index + 1]).mean() for index in pairs]))


def _displacements(before: Float[np.ndarray, 'H W'], after: Float[np.ndarray, 'H W']) -> Float[np.ndarray, 'R C']:
    """Return |d| of every square of a frame, in rows and columns."""
    rows, columns = ((size - 2 * REACH) // BLOCK for size in before.shape)
    height, width = rows * BLOCK, columns * BLOCK

    def cost(dy: int, dx: int) -> Float[np.ndarray, 'R C']:
        moved = after[REACH + dy :, REACH + dx :][:height, :width]
        return np.abs(kept - moved).reshape(rows, BLOCK, columns, BLOCK).sum(axis=(1, 3))

    kept = before[REACH:, REACH:][:height, :width]
    steps = range(-REACH, REACH + 1)
    # Shortest first, so that a later one must be better.
    nearest_first = sorted(((dy, dx) for dy in steps for dx in steps), key=lambda step: step[0] ** 2 + step[1] ** 2)
    still, length = cost(0, 0), np.zeros((rows, columns), np.float32)
    best = np.minimum((1 - SHARE) * still, still - LEVELS * BLOCK**2)
    for dy, dx in nearest_first[1:]:
        here = cost(dy, dx)
        better = here < best
        best, length = np.where(better, here, best), np.where(better, np.hypot(dy, dx), length)
    return length


def flicker(luma: Luma) -> float:
    """Measure the pulsing of brightness from frame to frame, in gray levels.

    With m(t, s) the mean luma of the 16x16 square s in frame t, the result is the mean over t and s of

        |m(t - 1, s) - 2 m(t, s) + m(t + 1, s)| / 4:

    0 for still pictures and steady fades, and A where brightness alternates between c - A and c + A.
    """
    count, rows, columns = len(luma), luma.shape[1] // BLOCK, luma.shape[2] // BLOCK
    squares = luma[:, : rows * BLOCK, : columns * BLOCK].reshape(count, rows, BLOCK, columns, BLOCK)
    return float(np.abs(np.diff(squares.mean(axis=(2, 4)), n=2, axis=0)).mean() / 4)


def sharpness(luma: Luma) -> float:
    """Measure the detail at the finest scale, in gray levels.

    The result is the root mean square, over all frames and all pixels but the outermost, of a pixel minus the mean of
    its four neighbors. It is 0 for flat pictures and even gradients; blur lowers it, noise and ringing raise it.
    """
    squares = [float(np.square(_against_neighbors(frame)).mean(dtype=np.float64)) for frame in luma]
    return float(np.sqrt(np.mean(squares)))


def _against_neighbors(frame: Float[np.ndarray, 'H W']) -> Float[np.ndarray, 'h w']:
    """Return each inner pixel minus the mean of its four neighbors."""
    vertical = frame[:-2, 1:-1] + frame[2:, 1:-1]
    return frame[1:-1, 1:-1] - (vertical + frame[1:-1, :-2] + frame[1:-1, 2:]) / 4


def saturation(frames: UInt8[np.ndarray, 'T H W 3']) -> float:
    """Measure the saturation: the mean over all pixels of (max(R, G, B) - min(R, G, B)) / 255.

    It is 0 for grays and 1 for pure red, yellow, cyan and so on. It is not divided by the brightness, so that noise in
    dark areas has little effect.
    """
    red, green, blue = np.moveaxis(frames, -1, 0)
    largest, least = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    return float((largest - least).mean(dtype=np.float64) / 255)


def mean_metrics(clips: Mapping[str, ClipMetrics]) -> ClipMetrics:
    """Return the means over clips; at least one is required."""
    return ClipMetrics(*(float(value) for value in np.mean(list(clips.values()), axis=0)))


def markdown_table(clips: Mapping[str, ClipMetrics]) -> str:
    """Return a Markdown table: a row per clip, and their mean where there are several."""
    heads = ['clip', *(f'{name} ({unit})' for name, unit in UNITS._asdict().items())]
    body = dict(clips) | ({'**mean**': mean_metrics(clips)} if len(clips) > 1 else {})
    rows = [[name.replace('|', r'\|'), *(f'{value:.3f}' for value in values)] for name, values in body.items()]
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    lines = [' | '.join(_aligned(row, widths)) for row in [heads, *rows]]
    rule = ' | '.join('-' * width if column == 0 else '-' * (width - 1) + ':' for column, width in enumerate(widths))
    return '\n'.join(f'| {line} |' for line in [lines[0], rule, *lines[1:]])


def _aligned(row: list[str], widths: list[int]) -> list[str]:
    """Return the cells of a row padded to their widths, text left-aligned and numbers right-aligned."""
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
