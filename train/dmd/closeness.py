"""Closeness of a student's videos to its teacher: their deviation from the teacher's videos, and the teacher's error.

Deviation is the relative distance of a unit from the teacher's unit of the same prompt, with the teacher's history
and with the student's own. Both differ from 0 even for a perfect student, because the noise differs; if errors
accumulate with the student's own history, the ratio of the two grows with the unit. The teacher's error is its flow
matching error on the re-noised video; collapsed or over-saturated videos raise it.

Legend: V videos, T latent frames (= units), H W latent grid, C channels.
Source: Self Forcing, arXiv 2506.08009 (the gap between the two histories).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from neodragon_jax.pyramid.history import envelope_history
from neodragon_jax.pyramid.sampler import Denoiser, Latents, NoiseSource, Prompt
from neodragon_jax.pyramid.stages import levels, stage_pair
from train.dmd.rollout import Rollout
from train.flow import losses

# Level of the re-noised video at which the teacher's error is measured: half noise.
LEVEL = 0.5


def behind_teacher_history(
    rollout: Rollout, denoise: Denoiser, prompt: Prompt, latents: Latents, first_unit: int, noise: NoiseSource
) -> Latents:
    """Return videos whose every unit the student generated with the teacher's frames as history.

    Args:
      denoise: the student.
      latents: the teacher's videos.
      first_unit: units before it are the teacher's.
      noise: that of the videos that the student generates with its own history.
    """
    white, units = rollout.noise(noise, latents.shape), [latents[:, :first_unit]]
    for unit in range(first_unit, rollout.frames):
        of_unit = [drawn[:, unit : unit + 1] for drawn in white]
        x, _ = rollout.unit(denoise, prompt, latents, jnp.int32(unit), rollout.unit_steps(unit), of_unit, watched=0)
        units.append(x)
    return jnp.concatenate(units, axis=1)


def deviation(
    videos: Float[np.ndarray, 'V T H W C'], teacher: Float[np.ndarray, 'V T H W C']
) -> Float[np.ndarray, ' T']:
    """Return the root mean square of the difference of every unit, relative to the teacher's unit."""
    square = lambda x: np.mean(np.square(x, dtype=np.float64), axis=(0, 2, 3, 4))
    return np.sqrt(square(np.asarray(videos, np.float32) - teacher) / square(teacher))


def teacher_error(
    teacher: Denoiser, rollout: Rollout, prompt: Prompt, videos: Latents, key: Array
) -> Float[np.ndarray, ' T']:
    """Return the teacher's mean squared flow error on every unit, over all stages.

    Args:
      teacher: the guided teacher.
      videos: clean latents; the history of each unit is the video itself.
      key: of the noise, the same for videos that are compared.
    """
    schedule, pyramid = rollout.schedule, levels(videos, rollout.schedule.stages)
    level, errors = jnp.full(videos.shape[:1], LEVEL), np.zeros(rollout.frames)
    for unit in range(rollout.frames):
        units = jnp.full(videos.shape[:1], unit, jnp.int32)
        for stage in range(schedule.stages):
            clean = pyramid[stage][:, unit : unit + 1]
            noise = jax.random.normal(jax.random.fold_in(key, unit * schedule.stages + stage), clean.shape)
            start, end = stage_pair(clean, noise, stage, schedule)
            history = envelope_history(pyramid, units, stage, rollout.frames - 1)
            x = losses.interpolate(start, end, level)
            flow = teacher(stage, history, x, units, prompt, schedule.timestep(stage, level))
            errors[unit] += float(jnp.mean(losses.squared_error(flow, start - end))) / schedule.stages
    return errors
