"""Portable noise, as `neodragon_jax/pyramid/portable_noise.py` specifies it: bit for bit the same numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from neodragon_phone.errors import BundleError

INITIAL, BLOCK, POSTERIOR, PICTURE, PICTURE_STEP = range(5)

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# Coefficients of rising powers of s^2 or x^2.
_LOG = [1 / n for n in range(1, 22, 2)]
_COS = [(-1) ** k / math.factorial(2 * k) for k in range(9)]
_SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)]


def threefry(key: tuple[int, int], first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the Threefry-2x32-20 block of each counter (first, second), of 32-bit words."""
    keys = [np.uint32(word) for word in (*key, key[0] ^ key[1] ^ 0x1BD11BDA)]
    x0, x1 = first + keys[0], second + keys[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(rotation) | x1 >> np.uint32(32 - rotation)) ^ x0
        x0 = x0 + keys[(block + 1) % 3]
        x1 = x1 + keys[(block + 2) % 3] + np.uint32(block + 1)
    return x0, x1


def check_seed(seed: int) -> None:
    """Raise BundleError unless a seed is in 0..2^64 - 1."""
    if not 0 <= seed < 2**64:
        raise BundleError(f'--seed {seed} is out of range; give a number from 0 to 2^64 - 1.')


def normals(seed: int, purpose: int, unit: int, stage: int, shape: Sequence[int]) -> np.ndarray:
    """Return the standard normal numbers of one use of noise, as float32.

    Raises:
      BundleError: the seed is not in 0..2^64 - 1.
    """
    check_seed(seed)
    count = math.prod(shape)
    first = np.arange((count + 1) // 2, dtype=np.uint32)
    stream = np.full_like(first, purpose << 24 | unit << 8 | stage)
    a, b = threefry((seed % 2**32, seed >> 32), first, stream)
    radius = np.sqrt(-2.0 * _log(2 * a.astype(np.int64) + 1))
    quadrant, rest = b >> np.uint32(30), (b & np.uint32(2**30 - 1)).astype(np.float64)
    angle = ((2.0 * rest + 1.0) / 2.0**31 - 0.5) * (math.pi / 2)
    square = angle * angle
    cos, sin = _polynomial(_COS, square), angle * _polynomial(_SIN, square)
    pairs = np.stack([np.choose(quadrant, [cos, -sin, -cos, sin]), np.choose(quadrant, [sin, cos, -sin, -cos])], axis=1)
    return (radius[:, None] * pairs).astype(np.float32).reshape(-1)[:count].reshape(shape)


def _log(numbers: np.ndarray) -> np.ndarray:
    """Return log(n / 2^33) of positive whole numbers below 2^33."""
    mantissa, exponent = np.frexp(numbers.astype(np.float64))
    small = mantissa < math.sqrt(0.5)
    mantissa, exponent = np.where(small, 2.0 * mantissa, mantissa), exponent - small
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return (exponent - 33.0) * math.log(2.0) + 2.0 * s * _polynomial(_LOG, s * s)


def _polynomial(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    """Return the polynomial by Horner's rule, coefficients of rising powers."""
    value = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value
