"""The spatial pyramid: halving and doubling, noise, and the flow between two stages.

A *unit* is one latent frame, generated at stages 0 (coarsest) to S-1 (full size).
Legend: B batch, T latent frames, H W latent grid, C channels.
Source: Pyramid-Flow, arXiv 2410.05954, section 3.2 (spatial pyramid).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.schedule import Schedule

Latents = Float[Array, 'B T H W C']


def down(x: Float[Array, '*B H W C'], times: int = 1) -> Float[Array, '*B h w C']:
    """Halve height and width `times` times: bilinear, align_corners false, no antialiasing.

    For even sizes this is the mean of every 2x2 block. Odd sizes are rounded down: 7 becomes 3.

    Raises:
      InputError: height or width is less than 2 before a halving.
    """
    for _ in range(times):
        *lead, height, width, channels = x.shape
        if min(height, width) < 2:
            raise InputError(f'cannot halve a {height}x{width} grid; use larger frames or fewer stages.')
        if height % 2 or width % 2:
            x = jax.image.resize(x, (*lead, height // 2, width // 2, channels), 'bilinear', antialias=False)
        else:
            x = x.reshape(*lead, height // 2, 2, width // 2, 2, channels).mean(axis=(-4, -2))
    return x


def up(x: Float[Array, '*B h w C']) -> Float[Array, '*B H W C']:
    """Double height and width, nearest neighbor."""
    return jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2)


def down_noise(noise: Float[Array, '*B H W C'], times: int) -> Float[Array, '*B h w C']:
    """Halve white noise `times` times, keeping unit variance (the mean of four has half the deviation)."""
    return down(noise, times) * 2.0**times


def levels(x: Latents, stages: int) -> list[Float[Array, 'B T _ _ C']]:
    """Return x at every stage, coarsest first; x itself is the last."""
    return [down(x, stages - 1 - stage) for stage in range(stages)]


def color_noise(white: Float[Array, '*B H W C'], gamma: float = 1 / 3) -> Float[Array, '*B H W C']:
    """Turn white noise into block noise: covariance 1 on the diagonal of each 2x2 block and -gamma off it.

    That matrix has the eigenvalue 1 - 3 gamma on the block mean and 1 + gamma on the rest, so its symmetric square
    root is two scalings; at gamma = 1/3 the mean vanishes. Source: arXiv 2410.05954, equation 13.
    """
    mean = up(down(white))
    return math.sqrt(1 + gamma) * (white - mean) + math.sqrt(max(0.0, 1 - 3 * gamma)) * mean


def block_noise(key: PRNGKeyArray, shape: Sequence[int], gamma: float = 1 / 3) -> Float[Array, ...]:
    """Draw block noise of shape [..., H, W, C], all blocks at once."""
    return color_noise(jax.random.normal(key, tuple(shape), jnp.float32), gamma)


def enter_stage(
    x: Latents, noise: Float[Array, 'B T h w C'], stage: int, schedule: Schedule
) -> Float[Array, 'B T h w C']:
    """Carry a finished stage into the next one: alpha Up(x) + beta block_noise, in float32."""
    alpha, beta = schedule.upsample_coefficients(stage)
    return alpha * up(x.astype(jnp.float32)) + beta * noise


def stage_pair(clean: Latents, noise: Latents, stage: int, schedule: Schedule) -> tuple[Latents, Latents]:
    """Return the start and the end of the flow of one stage, at the stage's resolution.

    start = s0 noise + (1 - s0) Up(Down(clean)), end = s1 noise + (1 - s1) clean, with the same noise at both ends.
    Source: arXiv 2410.05954, equations 9 and 10.
    """
    start_sigma, end_sigma = float(schedule.start_sigmas[stage]), float(schedule.end_sigmas[stage])
    end = end_sigma * noise + (1 - end_sigma) * clean
    if stage == 0:
        return noise, end  # s0 = 1: the start is pure noise, and the clean latent may be too small to halve.
    return start_sigma * noise + (1 - start_sigma) * up(down(clean)), end
