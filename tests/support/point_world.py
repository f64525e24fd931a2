"""A denoiser whose distribution is one point, in closed form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from neodragon_jax.pyramid import stages as pyramid
from neodragon_jax.pyramid.schedule import Schedule
from support.goldens import TINY_CHECKPOINT
from train.dmd import program as dmd
from train.flow import losses

SCHEDULE = Schedule()


FRAMES, GRID, CHANNELS, BATCH = 3, 8, 16, 8


class PointMass:
    """The exact flow of data that are always `params['point']`, moved by the mean of the pooled prompt."""

    def apply(self, variables, clips, text, mask, pooled, timestep, frame_ids):
        del text, mask, frame_ids
        x = clips[-1]
        stage = {GRID >> (2 - stage): stage for stage in range(3)}[x.shape[2]]
        first, last = SCHEDULE.timestep_limits[stage]
        level = losses.per_sample((timestep - last) / (first - last), x)
        clean = pyramid.down(variables['params']['point'], 2 - stage) + losses.per_sample(pooled.mean(axis=1), x)
        start, end = pyramid.stage_pair(clean, jnp.zeros_like(x), stage, SCHEDULE)
        mean = level * start + (1 - level) * end
        sigma = losses.per_sample(SCHEDULE.sigma(stage, level[:, 0, 0, 0, 0]), x)
        length = float(SCHEDULE.start_sigmas[stage] - SCHEDULE.end_sigmas[stage])
        return length * (x - mean) / sigma + start - end


def point(seed: int) -> dict[str, jax.Array]:
    return {'point': jax.random.normal(jax.random.key(seed), (1, 1, GRID, GRID, CHANNELS))}


def make_batch(pooled_scale: float = 1.0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return {
        'latents': draw(BATCH, FRAMES, GRID, GRID, CHANNELS),
        'text': draw(BATCH, 4, 8),
        'text_mask': jnp.ones((BATCH, 4), jnp.int32),
        'pooled': pooled_scale * draw(BATCH, 6),
    }


def point_program(length: int = FRAMES, **options) -> dmd.DMD:
    """Return the program, for `length` latent frames, with the closed-form denoiser in place of the network."""
    config = dmd.DMDConfig(checkpoint=str(TINY_CHECKPOINT), dtype='float32', remat='none', **options)
    negative = {
        'text': np.zeros((4, 64), np.float32),
        'text_mask': np.ones(4, np.int32),
        'pooled': np.ones(6, np.float32),
    }
    program = dmd.DMD(config, negative, length)
    program.module = program.teacher_module = PointMass()  # pyright: ignore[reportAttributeAccessIssue]
    program.negative = program.negative._replace(text=np.zeros((4, 8), np.float32))  # pyright: ignore[reportArgumentType]
    program.teacher = point(0)
    return program
