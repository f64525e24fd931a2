"""Progressive distillation: one step of the student covers several steps of a model that takes smaller ones.

From x at level l the student's step ends at m = l - 1 / n. The finer model takes K Euler steps there, and

    target = (x(l) - x(m)) / (l - m), the mean of its flow over the step

so that the student's one step ends where the K steps end. The finer model is the guided teacher, or the model from
which the student starts: the result of the previous round, as in the original method.

Legend: B batch, n steps of the student in a stage, K steps of the finer model in one of them.
Source: Progressive distillation, arXiv 2202.00512, algorithm 2; Neodragon, arXiv 2511.06055, appendix.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.sampler import Denoiser, Unit
from neodragon_jax.pyramid.schedule import euler_step
from train.dmd.examples import Draws, Example, Examples
from train.dmd.objectives.objective import Models, Values
from train.dmd.ramp import Weight
from train.flow import losses
from train.runtime.settings import check_range

TEACHER, START = 'teacher', 'start'


@dataclasses.dataclass(frozen=True)
class ProgressiveConfig(Weight):
    """Options of progressive distillation.

    Attributes:
      substeps: K, steps of the finer model in one of the student.
      finer: 'teacher', the guided teacher; or 'start', the model from which the student starts, without guidance.
    """

    substeps: int = 2
    finer: str = TEACHER

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 'substeps', least=1)
        if self.finer not in (TEACHER, START):
            raise InputError(f'finer is {self.finer!r}; use one of {TEACHER}, {START}.')

    @property
    def needs_start(self) -> bool:
        """Whether the objective uses the model from which the student starts."""
        return self.used and self.finer == START


def mean_flow(
    denoise: Denoiser, examples: Examples, stage: int, example: Example, length: Float[Array, ' B'], substeps: int
) -> Unit:
    """Return the mean flow of several Euler steps from an example's x over a part of the stage.

    Args:
      length: of that part, in local levels.
    """
    x, edges = example.x, [example.level - length * step / substeps for step in range(substeps + 1)]
    for level, after in itertools.pairwise(edges):
        flow = example.predict_flow(denoise, stage, x, examples.schedule.timestep(stage, level))
        x = euler_step(x, flow, losses.per_sample(level, x), losses.per_sample(after, x))
    return (example.x - x) / losses.per_sample(length, x)


@dataclasses.dataclass(frozen=True)
class Progressive:
    """The progressive objective: a Cauchy loss between the clean predictions of the student's flow and its target."""

    config: ProgressiveConfig
    name: str = 'progressive'

    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Draws:
        """Return nothing: the objective is deterministic."""
        del key, shape
        return {}

    def gradient(
        self, examples: Examples, stage: int, example: Example, z_theta: Unit, models: Models, draws: Any
    ) -> tuple[Unit, Values]:
        """Return the gradient of log(1 + ||z_theta - target||^2), and the squared error."""
        del draws
        finer = models.teacher if self.config.finer == TEACHER else models.start
        assert finer is not None, 'the program keeps the start for this objective'
        length = 1 / jnp.asarray(examples.count(stage, example.unit), jnp.float32)
        flow = mean_flow(finer, examples, stage, example, length, self.config.substeps)
        target = losses.clean_prediction(
            example.x, flow, example.level, stage, examples.schedule, examples.clean_prediction
        )
        slope, _ = losses.cauchy_slope(z_theta, target)
        return slope, {'progressive_mse': losses.squared_error(z_theta, target)}
