"""Drawing of scenes: the place of the shape in every frame, and the pixels.

In a shaded scene, light from the upper left takes up to `SHADE` of the shape's brightness on its far side, and the
background deviates from its color by up to `TEXTURE` levels, in plane waves that differ by clip and do not move. Both
stay within the margin of `attributes`: a pixel counts as the shape from three quarters of its color on, and as the
background up to one quarter.

Legend: T frames, H W pixels, K side of a box around the shape, S any shape.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, UInt8

from neodragon_jax.base.errors import InputError
from train.shapes.world import COLORS, DIRECTIONS, HALF_SQUARE, INNER_RADIUS, REACHES, SIZES, SPEEDS, Scene

# Share of a shape's brightness that is lost on the side away from the light.
SHADE = 0.15
# Largest deviation of the background from its color, in levels of 0..255, the number of its waves, and their lengths in
# sides.
TEXTURE, WAVES, WAVELENGTHS = 12.0, 4, (0.3, 1.2)


def coverage(
    shape: str, radius: float, x: Float[np.ndarray, '*#S'], y: Float[np.ndarray, '*#S']
) -> Float[np.ndarray, '*S']:
    """Return the covered share of each pixel, from its distance to the outline: an antialiased mask in 0..1.

    Args:
      radius: of the circle of equal area, in pixels.
      x, y: pixel centers seen from the shape's center of mass; y points down.
    """
    if shape == 'circle':
        inside = radius - np.sqrt(np.square(x) + np.square(y))
    elif shape == 'square':
        inside = radius * HALF_SQUARE - np.maximum(np.abs(x), np.abs(y))
    else:
        inside = radius * INNER_RADIUS - np.maximum(y, math.sqrt(3) / 2 * np.abs(x) - y / 2)
    return np.clip(inside + 0.5, 0, 1)


def track(scene: Scene, frames: int, height: int, width: int) -> Float[np.ndarray, 'T 2']:
    """Return the center of mass of the shape in every frame, x and y in pixels from the upper left corner."""
    traits, side = scene.traits, min(height, width)
    time = np.linspace(0, 1, frames) if frames > 1 else np.zeros(1)
    starts = (0.0, *(moment for moment, _ in scene.turns))
    headings = (traits.direction, *(direction for _, direction in scene.turns))
    way = np.zeros((frames, 2))
    for start, end, heading in zip(starts, (*starts[1:], 1.0), headings, strict=True):
        way += np.clip(time - start, 0, end - start)[:, None] * DIRECTIONS[heading]
    way *= SPEEDS[traits.speed] * side
    across, above, below = np.array(REACHES[traits.shape]) * SIZES[traits.size] * side
    least = np.array([across, above]) - way.min(axis=0)
    most = np.array([width - across, height - below]) - way.max(axis=0)
    return (way + least + scene.start * (most - least)).astype(np.float32)


def draw(scene: Scene, frames: int, height: int, width: int) -> UInt8[np.ndarray, 'T H W 3']:
    """Draw a scene, antialiased, as RGB bytes.

    Raises:
      InputError: there is no frame, or the picture is smaller than 16 pixels.
    """
    if frames < 1 or min(height, width) < 16:
        raise InputError(f'{frames} frames of {height}x{width}; give at least 1 of 16x16 pixels.')
    traits, side = scene.traits, min(height, width)
    radius, centers = SIZES[traits.size] * side, track(scene, frames, height, width)
    # Only a box around the shape is computed. It is shifted into the picture, which holds all of the shape.
    box = min(2 * math.ceil(max(REACHES[traits.shape]) * radius) + 3, side)
    corners = np.clip(np.floor(centers).astype(int) - box // 2, 0, [width - box, height - box])
    columns, rows = (corners[:, axis, None] + np.arange(box) for axis in (0, 1))  # T K
    x, y = (places - centers[:, axis, None] + 0.5 for axis, places in ((0, columns), (1, rows)))
    alpha = coverage(traits.shape, radius, x[:, None, :], y[:, :, None])
    video = np.empty((frames, height, width, 3), np.uint8)
    where = np.arange(frames)[:, None, None], rows[:, :, None], columns[:, None, :]
    if scene.texture is None:
        shades = np.linspace(COLORS[traits.background], COLORS[traits.color], 256).round().astype(np.uint8)
        video[:] = shades[0]
        video[where] = shades[np.rint(alpha * 255).astype(int)]
        return video
    behind = _background(scene, height, width)
    video[:] = np.rint(behind)
    lit = np.array(COLORS[traits.color]) * _light(x / radius, y / radius)[..., None]
    behind = behind[where[1], where[2]]
    video[where] = np.rint(behind + alpha[..., None] * (lit - behind))
    return video


def _light(x: Float[np.ndarray, 'T K'], y: Float[np.ndarray, 'T K']) -> Float[np.ndarray, 'T K K']:
    """Return the brightness of a shape at places seen from its center, in radii: 1 toward the light, less behind."""
    away = (x[:, None, :] + y[:, :, None]) / math.sqrt(2)
    return 1 - SHADE * np.clip((away + 1) / 2, 0, 1)


def _background(scene: Scene, height: int, width: int) -> Float[np.ndarray, 'H W 3']:
    """Return the background of a shaded scene, in levels."""
    rng = np.random.default_rng(scene.texture)
    x, y = (np.arange(count) + 0.5 for count in (width, height))
    angles, phases = rng.uniform(0, 2 * math.pi, (2, WAVES))
    numbers = 2 * math.pi / (rng.uniform(*WAVELENGTHS, WAVES) * min(height, width))
    along = np.cos(angles)[:, None, None] * x + np.sin(angles)[:, None, None] * y[:, None]
    pattern = np.cos(numbers[:, None, None] * along + phases[:, None, None]).mean(axis=0)
    levels = np.array(COLORS[scene.traits.background], float) + TEXTURE * pattern[..., None]
    return np.clip(levels, 0, 255)
