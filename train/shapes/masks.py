"""The shape in a clip's pixels: its mask and its track; the rules are those of `train.shapes.attributes`.

Legend: T frames, H W pixels, S any shape.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, UInt8

# Levels, of 0..255 per channel, by which a shape must differ from the background.
CONTRAST = 40.0
Mask = Float[np.ndarray, 'T H W']


def track_of(video: UInt8[np.ndarray, 'T H W 3']) -> Float[np.ndarray, 'T 2'] | None:
    """Return the shape's center of mass in every frame, x and y in sides; None where a frame shows no shape."""
    pixels = video.astype(np.float32)
    found = find_shape(pixels, border_colors(pixels))
    return None if found is None else track_of_mask(found[0])


def track_of_mask(share: Mask) -> Float[np.ndarray, 'T 2'] | None:
    """Return the track, in sides, of the share of the shape's color in each pixel; None if a frame has no core."""
    here = around_core(stretched(share))
    if not here.any(axis=(1, 2)).all():
        return None
    return centers_of_mass(np.clip(share, 0, 1) * here) / min(share.shape[1:])


def border_colors(pixels: Float[np.ndarray, 'T H W 3']) -> Float[np.ndarray, 'T 3']:
    """Return the median color of each frame's outermost pixels, of which a shape covers few."""
    edges = (pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1])
    return np.median(np.concatenate(edges, axis=1), axis=1)


def find_shape(
    pixels: Float[np.ndarray, 'T H W 3'], backgrounds: Float[np.ndarray, 'T 3']
) -> tuple[Mask, Float[np.ndarray, ' 3']] | None:
    """Return the share of the shape's color in each pixel, and the color itself; None if there is no shape."""
    contrast = pixels - backgrounds[:, None, None]
    distance = np.sqrt(np.square(contrast).sum(axis=-1))
    # Shapes cover 5 % of a wide picture and more; the hundredth part that differs most is surely inside.
    most = float(np.quantile(distance, 0.99))
    if most < CONTRAST:
        return None
    color = np.median(pixels[distance > 0.75 * most], axis=0)
    ray = color - backgrounds  # T 3
    return np.einsum('thwc,tc->thw', contrast, ray) / np.maximum(np.square(ray).sum(axis=-1), 1)[:, None, None], color


def stretched(share: Float[np.ndarray, '*S']) -> Float[np.ndarray, '*S']:
    """Return clip(2 m - 1/2, 0, 1) of a mask m, which keeps its edges in place."""
    return np.clip(2 * share - 0.5, 0, 1)


def around_core(mask: Mask) -> Bool[np.ndarray, 'T H W']:
    """Return a mask of the pixels at most 3 away from the core: the 3x3 squares that lie wholly in the given mask."""
    return _squares(_squares(mask > 0.5, 1, np.all), 3, np.any)


def _squares(
    pixels: Bool[np.ndarray, 'T H W'], reach: int, join: Callable[..., np.ndarray]
) -> Bool[np.ndarray, 'T H W']:
    """Return for each pixel whether all, or any, in the square around it are true; outside the picture is false."""
    for axis in (1, 2):
        margin = [(0, 0)] * 3
        margin[axis] = (reach, reach)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(pixels, margin), 2 * reach + 1, axis)  # pyright: ignore[reportCallIssue, reportArgumentType]
        pixels = join(windows, axis=-1)
    return pixels


def centers_of_mass(mask: Mask) -> Float[np.ndarray, 'T 2']:
    """Return each frame's center of mass, x and y in pixels."""
    _, height, width = mask.shape
    x, y = mask.sum(axis=1) @ (np.arange(width) + 0.5), mask.sum(axis=2) @ (np.arange(height) + 0.5)
    return np.stack([x, y], axis=1) / np.maximum(mask.sum(axis=(1, 2)), 1e-6)[:, None]
