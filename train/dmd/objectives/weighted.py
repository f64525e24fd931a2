"""Weighted sum of the student's objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.sampler import Unit
from train.dmd.examples import Draws, Example, Examples
from train.dmd.metrics import cosine, norm
from train.dmd.objectives.adversarial import Adversarial, AdversarialConfig
from train.dmd.objectives.consistency import Consistency, ConsistencyConfig
from train.dmd.objectives.matching import Matching, MatchingConfig
from train.dmd.objectives.objective import Models, Objective, Values
from train.dmd.objectives.progressive import Progressive, ProgressiveConfig
from train.dmd.objectives.regression import Regression, RegressionConfig
from train.flow import losses


@dataclasses.dataclass(frozen=True)
class ObjectivesConfig:
    """The objectives and their weights; the default is the paper's recipe. A weight of 0 leaves an objective out."""

    matching: MatchingConfig = dataclasses.field(default_factory=MatchingConfig)
    regression: RegressionConfig = dataclasses.field(default_factory=RegressionConfig)
    adversarial: AdversarialConfig = dataclasses.field(default_factory=AdversarialConfig)
    consistency: ConsistencyConfig = dataclasses.field(default_factory=ConsistencyConfig)
    progressive: ProgressiveConfig = dataclasses.field(default_factory=ProgressiveConfig)

    def __post_init__(self) -> None:
        if not self.parts():
            weights = ' and '.join(f'{field.name}.weight' for field in dataclasses.fields(self))
            raise InputError(f'{weights} are all 0: there is no objective; raise one.')

    def parts(self) -> list[Objective]:
        """Return the objectives that are active in the run."""
        parts: list[Objective] = [
            Matching(self.matching),
            Regression(self.regression),
            Adversarial(self.adversarial),
            Consistency(self.consistency),
            Progressive(self.progressive),
        ]
        return [part for part in parts if part.config.used]


def draw(parts: Sequence[Objective], key: PRNGKeyArray, shape: tuple[int, ...]) -> Draws:
    """Draw the random numbers of all objectives, as PART/NAME."""
    return {f'{part.name}/{name}': value for part in parts for name, value in part.draw(key, shape).items()}


def gradient(
    parts: Sequence[Objective],
    examples: Examples,
    stage: int,
    step: Int[Array, ''] | int,
    example: Example,
    z_theta: Unit,
    models: Models,
    draws: Mapping[str, Array],
) -> tuple[Unit, Values]:
    """Return the weighted sum of the objectives' gradients by `z_theta`, and the values to log per sample.

    With several objectives these include gradient/PART, the norm of each weighted gradient, and cosine/PART, its cosine
    with that of the first objective.
    """
    z_theta = jax.lax.stop_gradient(z_theta)
    values: Values = {'endpoint_mse': losses.squared_error(z_theta, example.clean)} if examples.with_data else {}
    gradients: dict[str, Any] = {}
    for part in parts:
        prefix = f'{part.name}/'
        own_draws = {name.removeprefix(prefix): value for name, value in draws.items() if name.startswith(prefix)}
        slope, logged = part.gradient(examples, stage, example, z_theta, models, own_draws)
        gradients[part.name] = part.config.at(stage, step) * slope
        values |= logged
    if len(parts) > 1:
        first = gradients[parts[0].name]
        values |= {f'gradient/{name}': norm(slope) for name, slope in gradients.items()}
        values |= {f'cosine/{name}': cosine(first, gradients[name]) for name in list(gradients)[1:]}
    return sum(gradients.values(), start=jnp.zeros_like(z_theta)), values
