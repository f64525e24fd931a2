"""Consistency (pyramidal mean flow): the student's flow becomes the mean of the teacher's from its level to the end.

With v the teacher's flow and u the student's along its trajectory, level u = integral of v from 0 to level, so

    target = v - level du/dlevel,   du/dlevel = the Jacobian of u times (v, 1), by `jax.jvp`

and a student that meets it jumps from any level of a stage to the stage's end in one step. It needs no fake model and
starts a distillation well; distribution matching then refines it.

Legend: B batch, h w the stage's grid, C channels.
Source: mean flow, arXiv 2505.13447, equation 6 (here always to the end of the stage); Causal-rCM, arXiv 2606.25473
(consistency first, distribution matching after it); Neodragon, arXiv 2511.06055, appendix (pyramidal mean flow).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from neodragon_jax.pyramid.sampler import Unit
from train.dmd.examples import Draws, Example, Examples
from train.dmd.objectives.objective import Models, Values
from train.dmd.ramp import Weight
from train.flow import losses


@dataclasses.dataclass(frozen=True)
class ConsistencyConfig(Weight):
    """Options of the consistency objective, which needs examples at all levels (`DMDConfig.levels` = 'uniform')."""


def mean_flow_target(
    flow: Callable[[Unit, Float[Array, ' B']], Unit], x: Unit, level: Float[Array, ' B'], velocity: Unit
) -> Unit:
    """Return v - level du/dlevel along the trajectory through x.

    Args:
      flow: the student's, of x and the local level.
      velocity: v, the teacher's flow at x, the derivative of x by the level.
    """
    _, slope = jax.jvp(flow, (x, level), (velocity, jnp.ones_like(level)))
    return velocity - losses.per_sample(level, x) * slope


@dataclasses.dataclass(frozen=True)
class Consistency:
    """The consistency objective: a Cauchy loss between the clean predictions of the student's flow and its target."""

    config: ConsistencyConfig
    name: str = 'consistency'

    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Draws:
        """Return nothing: the level is the example's."""
        del key, shape
        return {}

    def gradient(
        self, examples: Examples, stage: int, example: Example, z_theta: Unit, models: Models, draws: Any
    ) -> tuple[Unit, Values]:
        """Return the gradient of log(1 + ||z_theta - target||^2), and the squared error."""
        del draws
        schedule = examples.schedule

        def flow(x: Unit, level: Float[Array, ' B']) -> Unit:
            return example.predict_flow(models.student, stage, x, schedule.timestep(stage, level))

        velocity = example.predict_flow(models.teacher, stage, example.x, schedule.timestep(stage, example.level))
        target = mean_flow_target(flow, example.x, example.level, velocity)
        clean = losses.clean_prediction(example.x, target, example.level, stage, schedule, examples.clean_prediction)
        slope, _ = losses.cauchy_slope(z_theta, clean)
        return slope, {'consistency_mse': losses.squared_error(z_theta, clean)}
