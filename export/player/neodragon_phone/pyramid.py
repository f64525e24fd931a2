"""The arithmetic of the pyramid in NumPy, for one example: halving, doubling, block noise, patches.

Legend: H W latent grid, C channels, I patches, P numbers in a patch. Arrays are float32.
"""

from __future__ import annotations

import math

import numpy as np


def down(x: np.ndarray, times: int = 1) -> np.ndarray:
    """Return x [..., H, W, C] with height and width halved `times` times: the mean of every 2x2 block."""
    for _ in range(times):
        *lead, height, width, channels = x.shape
        x = x.reshape(*lead, height // 2, 2, width // 2, 2, channels).mean(axis=(-4, -2), dtype=np.float32)
    return x


def up(x: np.ndarray) -> np.ndarray:
    """Return x [..., H, W, C] with height and width doubled, nearest neighbor."""
    return x.repeat(2, axis=-3).repeat(2, axis=-2)


def color_noise(white: np.ndarray, gamma: float) -> np.ndarray:
    """Turn white noise into block noise: covariance 1 on the diagonal of each 2x2 block, -gamma off it."""
    mean = up(down(white))
    rest = np.float32(math.sqrt(1 + gamma)) * (white - mean)
    return rest + np.float32(math.sqrt(max(0.0, 1 - 3 * gamma))) * mean


def patchify(frame: np.ndarray, patch: int) -> np.ndarray:
    """Cut a frame [H, W, C] into patches [I, P]: row by row; inside a patch row, column, channel."""
    height, width, channels = frame.shape
    x = frame.reshape(height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 2, 1, 3, 4).reshape(-1, patch * patch * channels)


def unpatchify(patches: np.ndarray, patch: int, height: int, width: int) -> np.ndarray:
    """Undo `patchify`."""
    x = patches.reshape(height // patch, width // patch, patch, patch, -1)
    return x.transpose(0, 2, 1, 3, 4).reshape(height, width, -1)
