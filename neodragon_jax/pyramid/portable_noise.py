"""Counter-based noise that JAX, NumPy and C++ reproduce: one seed gives the same video on a pod, a laptop and a phone.

The bits are Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011); the
normals are Box-Muller in float64. Only +, -, *, / and sqrt are used, which IEEE 754 rounds exactly, so two runtimes
agree bit for bit unless a compiler contracts a * b + c to one operation (C++: -ffp-contract=off).

    normals(seed, stream, count):                  # float32; element 2 i and 2 i + 1 are pair i of the stream
        for i in 0, 1, ..., ceil(count / 2) - 1:
            a, b = threefry(key=(seed mod 2^32, seed / 2^32), counter=(i, stream))
            radius = sqrt(-2 log((2 a + 1) / 2^33))               # a is never 0 or 1 as a uniform number
            x = ((2 (b mod 2^30) + 1) / 2^31 - 1/2) (pi / 2)      # an angle in (-pi/4, pi/4)
            c, s = cos(x), sin(x)
            pair = (c, s), (-s, c), (-c, -s), (s, -c) [b / 2^30]  # the two highest bits are the quadrant
            emit float32(radius pair[0]), float32(radius pair[1])

    threefry(key, counter):                        # 32-bit words, sums modulo 2^32
        keys = key[0], key[1], key[0] xor key[1] xor 0x1BD11BDA
        x0, x1 = counter[0] + keys[0], counter[1] + keys[1]
        for block in 0, 1, 2, 3, 4:
            for rotation in (13, 15, 26, 6) if block is even else (17, 29, 16, 24):
                x0 = x0 + x1;  x1 = rotate_left(x1, rotation) xor x0
            x0, x1 = x0 + keys[(block + 1) mod 3], x1 + keys[(block + 2) mod 3] + block + 1
        return x0, x1

    log(n / 2^33):  n = m 2^e with m in [1/2, 1); if m < sqrt(1/2): m = 2 m, e = e - 1
                    s = (m - 1) / (m + 1);  (e - 33) ln 2 + 2 s (1 + s^2/3 + s^4/5 + ... + s^20/21)
    cos(x), sin(x): Taylor polynomials up to x^16 / 16! and x^17 / 17!; all polynomials by Horner's rule in x^2 or s^2

    stream = purpose 2^24 + unit 2^8 + stage

    purpose  unit     stage  numbers
    0        u        0      initial white noise of unit u, [H, W, C] at full size
    1        u        s      white noise on entering stage s > 0 of unit u, [h, w, C]; `stages.color_noise` follows
    2        0        0      posterior sample of a first frame, [h, w, C]
    3        0        0      initial noise of the first frame's picture, [h, w, C]
    4        step     0      added after a step of the first frame's picture, [h, w, C]
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt32

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.schedule import Schedule
from neodragon_jax.pyramid.stages import color_noise

INITIAL, BLOCK, POSTERIOR, PICTURE, PICTURE_STEP = range(5)

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
# Coefficients of rising powers of s^2 or x^2.
_LOG = [1 / n for n in range(1, 22, 2)]
_COS = [(-1) ** k / math.factorial(2 * k) for k in range(9)]
_SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)]

Words = UInt32[np.ndarray, ' N']


def threefry(key: tuple[int, int], first: Words, second: Words) -> tuple[Words, Words]:
    """Return the Threefry-2x32-20 block of each counter (first, second)."""
    keys = [np.uint32(word) for word in (*key, key[0] ^ key[1] ^ 0x1BD11BDA)]
    x0, x1 = first + keys[0], second + keys[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(rotation) | x1 >> np.uint32(32 - rotation)) ^ x0
        x0 = x0 + keys[(block + 1) % 3]
        x1 = x1 + keys[(block + 2) % 3] + np.uint32(block + 1)
    return x0, x1


def stream_of(purpose: int, unit: int = 0, stage: int = 0) -> int:
    """Return the number of a stream: one per use of noise in a video."""
    return purpose << 24 | unit << 8 | stage


def normals(seed: int, stream: int, count: int) -> Float32[np.ndarray, ' count']:
    """Return the first `count` standard normal numbers of a stream.

    Args:
      seed: in 0..2^64 - 1.
    Raises:
      InputError: the seed is out of range.
    """
    if not 0 <= seed < 2**64:
        raise InputError(f'seed {seed} is out of range; give a number from 0 to 2^64 - 1.')
    first = np.arange((count + 1) // 2, dtype=np.uint32)
    a, b = threefry((seed % 2**32, seed >> 32), first, np.full_like(first, stream))
    radius = np.sqrt(-2.0 * _log(2 * a.astype(np.int64) + 1))
    quadrant, rest = b >> np.uint32(30), (b & np.uint32(2**30 - 1)).astype(np.float64)
    angle = ((2.0 * rest + 1.0) / 2.0**31 - 0.5) * (math.pi / 2)
    square = angle * angle
    cos, sin = _polynomial(_COS, square), angle * _polynomial(_SIN, square)
    pairs = np.stack([np.choose(quadrant, [cos, -sin, -cos, sin]), np.choose(quadrant, [sin, cos, -sin, -cos])], axis=1)
    return (radius[:, None] * pairs).astype(np.float32).reshape(-1)[:count]


@dataclasses.dataclass(frozen=True)
class PortableNoise:
    """`sampler.NoiseSource` of one seed per sample.

    Attributes:
      seeds: one per sample, each in 0..2^64 - 1.
      place: puts an array with a leading batch axis on the devices.
    """

    seeds: Sequence[int]
    schedule: Schedule = Schedule()
    place: Callable[[Any], Array] = jnp.asarray

    def initial(self, shape: tuple[int, ...]) -> Float[Array, 'B T H W C']:
        units = [_white(self.seeds, stream_of(INITIAL, unit), shape[2:]) for unit in range(shape[1])]
        return self.place(np.stack(units, axis=1))

    def block(self, unit: int, stage: int, shape: tuple[int, ...]) -> Float[Array, 'B 1 h w C']:
        white = _white(self.seeds, stream_of(BLOCK, unit, stage), shape[1:])
        return color_noise(self.place(white), self.schedule.gamma)

    def posterior(self, shape: tuple[int, ...]) -> Float[Array, 'B 1 h w C']:
        return self.place(_white(self.seeds, stream_of(POSTERIOR), shape[1:]))


@dataclasses.dataclass(frozen=True)
class PortablePictureNoise:
    """`consistency_sampler.PictureNoise` of one seed per picture; the seeds may be those of a `PortableNoise`."""

    seeds: Sequence[int]
    place: Callable[[Any], Array] = jnp.asarray

    def initial(self, shape: tuple[int, ...]) -> Float[Array, 'B h w C']:
        return self.place(_white(self.seeds, stream_of(PICTURE), shape[1:]))

    def step(self, number: int, shape: tuple[int, ...]) -> Float[Array, 'B h w C']:
        return self.place(_white(self.seeds, stream_of(PICTURE_STEP, number), shape[1:]))


def _white(seeds: Sequence[int], stream: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return white noise of one stream for each of [B] seeds, [B, *shape]."""
    return np.stack([normals(seed, stream, math.prod(shape)).reshape(shape) for seed in seeds])


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
