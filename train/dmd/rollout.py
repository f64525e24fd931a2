"""On-policy history: the student generates what it is then trained behind, instead of reading it from the data.

A student that has only ever seen the teacher's history may keep the motion behind it and lose it behind its own. Here
it draws whole videos, one unit after the other, as `sampler.sample` does but inside a training step; no gradient
passes. What share of the examples gets them rises with the steps (`OwnHistoryConfig`).

Legend: B batch, T latent frames (= units), H W full-size latent grid, h w a stage's, C channels, n steps of a stage.
Source: Self Forcing, arXiv 2506.08009 (training on the model's own rollout); Pyramid-Flow, arXiv 2410.05954 (sampler).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.sampler import Denoiser, DrawnNoise, Latents, NoiseSource, Prompt, Unit, euler_steps
from neodragon_jax.pyramid.schedule import Schedule
from neodragon_jax.pyramid.stages import down_noise, enter_stage, envelope_history, levels


@dataclasses.dataclass(frozen=True)
class OwnHistoryConfig:
    """Which share of the examples stands behind the student's own history, by the step.

    The share is `first` up to step `ramp_start`, then rises or falls in a straight line to `last` within `ramp_steps`
    steps. 0 throughout, the default, is the paper's objective: the history of the data. What stands behind an example
    changes no target: the regression still aims at the data's frame, the matching at what the teacher makes of it.

    Attributes:
      arrive: these examples also start where the student's own earlier stages of the unit lead, instead of at a noisy
        latent of the data.
    """

    first: float = 0.0
    last: float = 0.0
    ramp_start: int = 0
    ramp_steps: int = 0
    arrive: bool = True

    def __post_init__(self) -> None:
        for name in ('first', 'last'):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f'own_history.{name} is {getattr(self, name)}; it must be in 0..1.')
        for name in ('ramp_start', 'ramp_steps'):
            if getattr(self, name) < 0:
                raise InputError(f'own_history.{name} is {getattr(self, name)}; it must be at least 0.')

    @property
    def ever(self) -> bool:
        """Whether any step may use it."""
        return bool(self.first or self.last)

    def share(self, step: Int[Array, '']) -> Float[Array, '']:
        """Return the share at a step."""
        done = (jnp.asarray(step, jnp.float32) - self.ramp_start) / max(self.ramp_steps, 1)
        # Without a ramp the share jumps at `ramp_start`, not a step later.
        done = jnp.clip(done, 0, 1) if self.ramp_steps else (done >= 0).astype(jnp.float32)
        return self.first + (self.last - self.first) * done


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How a student with n steps in every stage generates.

    Attributes:
      frames: T.
      steps: n.
    """

    frames: int
    steps: int
    schedule: Schedule

    def videos(
        self, denoise: Denoiser, prompt: Prompt, latents: Latents, first_unit: int, noise: NoiseSource
    ) -> Latents:
        """Return videos that continue the first `first_unit` frames of others; the last frame, no history, is zero.

        With the same noise these are the frames of `sampler.sample`.
        """
        batch, stages = latents.shape[0], self.schedule.stages
        # The noise of all units, by stage: the loop picks that of its unit.
        white = [self._coarse(noise.initial(latents.shape))]
        for stage in range(1, stages):
            drawn = [noise.block(unit, stage, self._shape(latents, stage)) for unit in range(self.frames - 1)]
            white.append(jnp.concatenate(drawn, axis=1))

        def generate(unit: Array, video: Latents) -> Latents:
            units = jnp.full((batch,), unit, jnp.int32)
            pyramid = levels(video, stages)
            x, *entering = (jax.lax.dynamic_slice_in_dim(drawn, unit, 1, axis=1) for drawn in white)
            for stage in range(stages):
                if stage:
                    x = enter_stage(x, entering[stage - 1], stage, self.schedule)
                x = self._stage(denoise, prompt, pyramid, units, stage, x)[-1]
            return jax.lax.dynamic_update_slice_in_dim(video, x, unit, axis=1)

        given = (jnp.arange(self.frames) < first_unit)[:, None, None, None]
        # A loop, not a row of copies: the step compiles the denoiser once per stage.
        return jax.lax.fori_loop(first_unit, self.frames - 1, generate, jnp.where(given, latents, 0))

    def inputs(
        self,
        denoise: Denoiser,
        prompt: Prompt,
        latents: Latents,
        unit: Int[Array, ' B'],
        stage: int,
        noise: NoiseSource,
    ) -> list[Unit]:
        """Return what the student is asked at in a stage of its own: x before each of its n steps there.

        Args:
          latents: each example's history, full size; only frames before `unit` are read.
        """
        pyramid = levels(latents, self.schedule.stages)
        x = self._coarse(noise.initial(self._shape(latents, self.schedule.stages - 1)))
        for earlier in range(stage):
            x = self._stage(denoise, prompt, pyramid, unit, earlier, x)[-1]
            fresh = noise.block(0, earlier + 1, self._shape(latents, earlier + 1))
            x = enter_stage(x, fresh, earlier + 1, self.schedule)
        return self._stage(denoise, prompt, pyramid, unit, stage, x, self.steps - 1)

    def _coarse(self, noise: Latents) -> Latents:
        return down_noise(noise, self.schedule.stages - 1)

    def _shape(self, latents: Latents, stage: int) -> tuple[int, ...]:
        """Return the shape of one unit at a stage."""
        batch, _, height, width, channels = latents.shape
        halvings = self.schedule.stages - 1 - stage
        return batch, 1, height >> halvings, width >> halvings, channels

    def _stage(
        self,
        denoise: Denoiser,
        prompt: Prompt,
        pyramid: Sequence[Latents],
        units: Int[Array, ' B'],
        stage: int,
        x: Unit,
        count: int | None = None,
    ) -> list[Unit]:
        """Return x before the first `count` steps of a stage and after each of them; default: all n."""
        history = envelope_history(pyramid, units, stage, self.frames - 1)
        after = euler_steps(denoise, self.schedule, stage, self.steps, history, x, units, prompt)
        return [x, *itertools.islice(after, count)]


def drawn_noise(key: PRNGKeyArray, batch: int, schedule: Schedule) -> DrawnNoise:
    """Return the noise of a batch of generations."""
    return DrawnNoise(jax.random.split(key, batch), schedule)
