"""Noise levels of the pyramid's stages, their timesteps, and the Euler step.

Pyramidal flow matching (arXiv 2410.05954, section 3.2) cuts one flow from noise to data into stages of growing
resolution. Inside a stage the *local* level runs from 1 (start) to 0 (end); the *global* level `sigma` runs from the
stage's start sigma to its end sigma. Everything here is a small table of constants, computed in float64 on the host.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.spacings import SPACINGS

# A local level; the schedule's tables hold NumPy numbers.
Scalar = float | np.floating | Array

# The last of several steps starts at this local level (the training grid's finest), so it is 0.001 long.
FINEST_LEVEL = 0.001


class Steps(NamedTuple):
    """The denoiser calls of one stage."""

    timesteps: np.ndarray  # [n], conditioning of the denoiser, in 0..1000
    levels: np.ndarray  # [n + 1], local levels, from 1 to 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Constants of the stages.

    Attributes:
      gamma: correlation of the block noise between stages.
      spacing: levels of the steps in a stage: 'released', from 1 to 0.001, as the released weights expect; or 'even',
        k / n, for the distillation of a student with several steps. With one step, both are the same.
    """

    stages: int = 3
    gamma: float = 1 / 3
    train_steps: int = 1000
    spacing: str = 'released'

    def __post_init__(self) -> None:
        if self.stages < 1:
            raise InputError(f'Schedule.stages is {self.stages}; at least one stage is needed.')
        if not 0 < self.gamma <= 1 / 3:
            raise InputError(f'Schedule.gamma is {self.gamma}; block noise exists for 0 < gamma <= 1/3.')
        if self.spacing not in SPACINGS:
            raise InputError(f'Schedule.spacing is {self.spacing!r}; use one of {", ".join(SPACINGS)}.')

    @functools.cached_property
    def _bounds(self) -> np.ndarray:
        """Uncorrected sigmas at the stage limits, [stages + 1]."""
        index = np.array([int(i / self.stages * self.train_steps) for i in range(self.stages)])
        return np.append((self.train_steps - index) / self.train_steps, 0.0)

    @functools.cached_property
    def end_sigmas(self) -> np.ndarray:
        """Global level at the end of each stage, [stages]."""
        return self._bounds[1:]

    def _rescale(self, stage: int) -> float:
        """Return alpha of a stage > 0: 1 / (sqrt(1 + 1/gamma) sigma + 1 - sigma), sigma its uncorrected start."""
        sigma = self._bounds[stage]
        return float(1 / (np.sqrt(1 + 1 / self.gamma) * sigma + 1 - sigma))

    @functools.cached_property
    def start_sigmas(self) -> np.ndarray:
        """Global level at the start of each stage, [stages].

        Upsampling leaves more noise than the previous stage ended with, so later stages start higher
        (arXiv 2410.05954, equation 15).
        """
        corrected = [1 - (1 - self._bounds[stage]) * self._rescale(stage) for stage in range(1, self.stages)]
        return np.array([self._bounds[0], *corrected])

    def upsample_coefficients(self, stage: int) -> tuple[float, float]:
        """Return (alpha, beta) of `x <- alpha Up(x) + beta block_noise` on entering a stage > 0.

        Raises:
          InputError: the stage is 0 or does not exist.
        """
        if not 0 < stage < self.stages:
            raise InputError(f'stage {stage} has no upsampling before it; use 1..{self.stages - 1}.')
        alpha = self._rescale(stage)
        return alpha, float(alpha * self._bounds[stage] / np.sqrt(self.gamma))

    @functools.cached_property
    def timestep_ratios(self) -> np.ndarray:
        """Share of the global timesteps of each stage, as [stages, (from, to)] in 0..1."""
        lengths = self.start_sigmas - self.end_sigmas
        edges = np.append(0.0, np.cumsum(lengths) / lengths.sum())
        edges[-1] = 1.0
        return np.stack([edges[:-1], edges[1:]], axis=1)

    @functools.cached_property
    def timestep_limits(self) -> np.ndarray:
        """Timesteps at the two ends of each stage, [stages, 2]; 1000, 744, 386, 1 for the released schedule."""
        index = np.minimum((self.timestep_ratios * self.train_steps).astype(int), self.train_steps - 1)
        return (self.train_steps - index).astype(np.float64)

    @functools.cached_property
    def train_timesteps(self) -> np.ndarray:
        """Timestep of every training level, [stages, train_steps]."""
        return np.linspace(self.timestep_limits[:, 0], self.timestep_limits[:, 1], self.train_steps, endpoint=False).T

    @functools.cached_property
    def train_levels(self) -> np.ndarray:
        """Local level of every training index, [train_steps]: 1, 0.999, ..., 0.001."""
        return 1 - np.arange(self.train_steps) / self.train_steps

    def timestep(self, stage: int, level: Float[Array, '*shape']) -> Float[Array, '*shape']:
        """Return the timestep at a local level in [0, 1] of a stage (linear between the stage's limits)."""
        first, last = self.timestep_limits[stage]
        return (last + (first - last) * jnp.asarray(level, jnp.float32)).astype(jnp.float32)

    def sigma(self, stage: int, level: Float[Array, '*shape']) -> Float[Array, '*shape']:
        """Return the global level: (1 - level) end_sigma + level start_sigma."""
        level = jnp.asarray(level, jnp.float32)
        return (1 - level) * float(self.end_sigmas[stage]) + level * float(self.start_sigmas[stage])

    def steps(self, stage: int, count: int) -> Steps:
        """Return the timesteps and local levels of `count` Euler steps in a stage.

        Raises:
          InputError: count is not in 1..train_steps.
        """
        if not 1 <= count <= self.train_steps:
            raise InputError(f'{count} steps in stage {stage}; give between 1 and {self.train_steps}.')
        if self.spacing == 'even':
            levels = np.linspace(1.0, 0.0, count + 1)
            first, last = self.timestep_limits[stage]
            return Steps(last + (first - last) * levels[:-1], levels)
        table = self.train_timesteps[stage]
        return Steps(np.linspace(table[0], table[-1], count), np.append(np.linspace(1.0, FINEST_LEVEL, count), 0.0))


def euler_step(
    x: Float[Array, '*shape'], flow: Float[Array, '*shape'], level: Scalar, next_level: Scalar
) -> Float[Array, '*shape']:
    """Return x + (next_level - level) * flow, computed in float32.

    `flow` is start - end of the stage, the derivative of x by the local level.
    """
    step = jnp.asarray(next_level, jnp.float32) - jnp.asarray(level, jnp.float32)
    return x.astype(jnp.float32) + step * flow.astype(jnp.float32)
