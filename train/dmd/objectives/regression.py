"""Regression of the student's predictions to the data with the Cauchy loss log(1 + ||z_theta - z||^2).

After the student's own history the data's frame is not a valid target: its motion continues another history. Such
examples are left out by default. Where the data stores the starts of the teacher's stages (`DMDConfig.pairs`), x and
target lie on one path of the teacher, and the regression teaches the map from noise to data instead of a mean.

Source: Neodragon, arXiv 2511.06055, section on step distillation (regression loss, weight 0.5).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from neodragon_jax.pyramid.sampler import Unit
from train.dmd.examples import Draws, Example, Examples
from train.dmd.objectives.objective import Models, Values
from train.dmd.ramp import Weight
from train.flow import losses
from train.runtime.settings import check_range


@dataclasses.dataclass(frozen=True)
class RegressionConfig(Weight):
    """Options of the regression.

    Attributes:
      own_history: further factor for examples with the student's own history.
    """

    weight: float = 0.5
    own_history: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 'own_history', least=0)


@dataclasses.dataclass(frozen=True)
class Regression:
    """The regression to the data."""

    config: RegressionConfig
    name: str = 'regression'

    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Draws:
        """Return nothing: the regression is deterministic."""
        del key, shape
        return {}

    def gradient(
        self, examples: Examples, stage: int, example: Example, z_theta: Unit, models: Models, draws: Draws
    ) -> tuple[Unit, Values]:
        """Return the gradient of the Cauchy loss, and the loss."""
        del examples, stage, models, draws
        factor = jnp.where(example.own, self.config.own_history, 1.0)
        slope, values = losses.cauchy_slope(z_theta, example.target, factor)
        return slope, {'cauchy': values}
