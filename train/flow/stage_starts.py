"""Starts of the teacher's stages, stored beside a sample: the noise-paired path from noise to data.

A sample holds x before the first step of each stage of every unit, as `start_0`, `start_1`, ... A student that is
trained on these pairs learns the teacher's map from noise to data; with fresh noise a regression learns a mean.

Legend: B batch, T latent frames (= units), H W full-size latent grid, h w a stage's grid, C channels.
Source: DMD, arXiv 2311.18828, section 3.3 (regression on pairs of noise and the teacher's sample).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.sampler import Denoiser, History, Prompt, Unit
from neodragon_jax.pyramid.schedule import Schedule
from neodragon_jax.pyramid.stages import down

Starts = dict[str, Float[Array, 'B T h w C']]


def start_name(stage: int) -> str:
    """Return the name of the stored starts of a stage."""
    return f'start_{stage}'


def start_shapes(latents: tuple[int, int, int, int], stages: int) -> dict[str, tuple[int, ...]]:
    """Return the shape [T, h, w, C] of a sample's starts by name; `latents` is the shape [T, H, W, C]."""
    frames, height, width, channels = latents
    return {
        start_name(stage): (frames, height >> (stages - 1 - stage), width >> (stages - 1 - stage), channels)
        for stage in range(stages)
    }


class StartRecorder:
    """A denoiser that keeps x before the first step of each stage of every unit."""

    def __init__(self, denoise: Denoiser) -> None:
        self._denoise, self._stage = denoise, -1
        self._seen: dict[int, list[Unit]] = {}

    def __call__(
        self,
        stage: int,
        history: History,
        x: Unit,
        unit: Int[Array, ' B'],
        prompt: Prompt,
        timestep: Float[Array, ' B'],
    ) -> Unit:
        """Return the flow; the calls are those of `sampler.sample`, in its order."""
        if stage != self._stage:
            self._seen.setdefault(stage, []).append(x)
            self._stage = stage
        return self._denoise(stage, history, x, unit, prompt, timestep)

    def starts(self, frames: int) -> Starts:
        """Return the starts of videos of `frames` units; zero for a given first frame."""
        found: Starts = {}
        for stage, units in self._seen.items():
            nothing = [jnp.zeros_like(units[0])] * (frames - len(units))
            found[start_name(stage)] = jnp.concatenate([*nothing, *units], axis=1)
        return found


def teacher_path(
    batch: Mapping[str, Array], stage: int, unit: Int[Array, ' B'], schedule: Schedule
) -> tuple[Unit, Unit]:
    """Return the start and the end of the teacher's path through a stage, of one unit of every sample.

    The block noise that is added between two stages has the mean 0 in every 2x2 block (gamma = 1/3), so that the end of
    a stage is the halved start of the next one, divided by the factor of the upsampling. The last stage ends at the
    latents.

    Args:
      batch: latents [B, T, H, W, C] and the starts of all stages.
    """
    of_unit = lambda name: batch[name].astype(jnp.float32)[jnp.arange(unit.shape[0]), unit][:, None]
    start = of_unit(start_name(stage))
    if stage == schedule.stages - 1:
        return start, of_unit('latents')
    return start, down(of_unit(start_name(stage + 1))) / schedule.upsample_coefficients(stage + 1)[0]


def check_stored(names: Mapping[str, object], stages: int) -> None:
    """Raise InputError unless samples hold the starts of all stages.

    Args:
      names: the arrays of the samples by name.
    """
    absent = [start_name(stage) for stage in range(stages) if start_name(stage) not in names]
    if absent:
        raise InputError(
            f'config.dmd.pairs is True, but the samples hold no {", ".join(absent)}; make them with '
            'train.teacher_samples --store-starts, or set pairs to False.'
        )
