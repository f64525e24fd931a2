"""Distribution matching: the student's predictions move to where the teacher's density exceeds the fake model's.

    gradient = w (D(z_tau) - D_phi(z_tau)), w = 1 / ||D(z_tau) - (y0 - y1)||_1

Source: Neodragon, arXiv 2511.06055, section on step distillation; DMD, arXiv 2311.18828.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.sampler import Unit
from train.dmd.examples import Draws, Example, Examples
from train.dmd.objectives.objective import Models, Values
from train.dmd.ramp import Weight
from train.flow import losses


@dataclasses.dataclass(frozen=True)
class MatchingConfig(Weight):
    """Options of distribution matching.

    Attributes:
      taus: local levels at which teacher and fake model are compared.
    """

    weight: float = 1.0
    # Four evenly spaced levels inside (0, 1). Both ends carry no information: at 1 the coarsest stage is pure
    # noise, which does not depend on z_theta, and at 0 the finest is z_theta itself, without noise to remove.
    taus: tuple[float, ...] = (0.125, 0.375, 0.625, 0.875)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.taus or not all(0 <= tau <= 1 for tau in self.taus):
            raise InputError(f'taus is {self.taus}; give at least one level in 0..1.')


@dataclasses.dataclass(frozen=True)
class Matching:
    """The distribution matching objective."""

    config: MatchingConfig
    name: str = 'matching'

    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Draws:
        """Draw a level and the noise of the probe."""
        _, tau_key, noise_key = jax.random.split(key, 3)
        tau = jax.random.choice(tau_key, jnp.asarray(self.config.taus, jnp.float32), shape[:1])
        return {'tau': tau, 'noise': jax.random.normal(noise_key, shape)}

    def gradient(
        self, examples: Examples, stage: int, example: Example, z_theta: Unit, models: Models, draws: Draws
    ) -> tuple[Unit, Values]:
        """Return w (D - D_phi), and the probe's values to log."""
        probe = examples.probe(z_theta, stage, draws['tau'], draws['noise'])
        teacher = example.predict_flow(models.teacher, stage, probe.x, probe.timestep)
        fake = example.predict_flow(models.fake, stage, probe.x, probe.timestep)
        weight = losses.probe_weight(teacher, probe.flow)
        values = {
            'teacher_error': losses.squared_error(teacher, probe.flow),
            'direction_square': losses.squared_error(teacher, fake),
            'weight': weight,
        }
        return losses.matching_direction(teacher, fake, weight), values
