"""Adversarial objective: a critic on the fake model's features separates re-noised data and student predictions.

    critic:   softplus(-C(z_tau of the data)) + softplus(C(z_tau of the student)), with the same noise and level
    student:  softplus(-C(z_tau of the student))

The fake model is trained with the critic's loss as well, in its own updates. Matching alone leaves one-step students
blurred; this term makes them sharp. Two optional terms of the critic's loss keep its slope small, R1 at the data and R2
at the student's predictions. The expectation of the squared change along white noise e is the squared slope, so that
they need no second derivative:

    r1 ((C(z_tau + s e) - C(z_tau)) / s)^2 at the data, and r2 times the same at the student's predictions

Legend: B batch, X tokens of the current unit, D width, R registers.
Source: One-Forcing, arXiv 2605.23458 (both weights 0.03, registers on two late blocks); DMD2, arXiv 2405.14867;
approximated R1, arXiv 2501.08316.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.sampler import Unit
from train.dmd.examples import Draws, Example, Examples
from train.dmd.objectives.objective import Models, Values
from train.dmd.ramp import Weight
from train.pruning.features import Features
from train.runtime.settings import check_range


@dataclasses.dataclass(frozen=True)
class AdversarialConfig(Weight):
    """Options of the adversarial objective; its weight also scales the critic's loss.

    Attributes:
      depths: blocks whose features the critic sees, as a share of the fake model's depth.
      registers: learned queries per block.
      r1, r2: weights of the two slope terms; 0 for none. Each costs one more call of the fake model.
      slope_step: s, deviation of the noise of the slope terms.
    """

    depths: tuple[float, ...] = (2 / 3, 1.0)
    registers: int = 4
    r1: float = 0.0
    r2: float = 0.0
    slope_step: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.depths or not all(0 < depth <= 1 for depth in self.depths):
            raise InputError(f'depths is {self.depths}; give shares of the depth in 0..1, 0 excluded.')
        check_range(self, 'registers', least=1)
        check_range(self, 'r1', 'r2', least=0)
        check_range(self, 'slope_step', above=0)


class Critic(nn.Module):
    """Learned registers that attend to features of several blocks and give one logit per sample."""

    registers: int

    @nn.compact
    def __call__(self, layers: Sequence[Float[Array, 'B X D']]) -> Float[Array, ' B']:
        """Return the logits: large for data."""
        seen = []
        for number, tokens in enumerate(layers):
            width = tokens.shape[-1]
            tokens = nn.LayerNorm(name=f'norm_{number}')(tokens.astype(jnp.float32))
            queries = self.param(f'registers_{number}', nn.initializers.normal(0.02), (self.registers, width))
            key = nn.Dense(width, use_bias=False, name=f'critic_key_{number}')(tokens)
            value = nn.Dense(width, name=f'critic_value_{number}')(tokens)
            scores = jnp.einsum('rd,bxd->brx', queries, key) / math.sqrt(width)
            seen.append(jnp.einsum('brx,bxd->brd', nn.softmax(scores), value).mean(axis=1))
        hidden = nn.LayerNorm(name='norm')(jnp.concatenate(seen, axis=-1))
        return nn.Dense(1, name='logit')(nn.silu(hidden))[:, 0]


def critic_layers(features: Features, depths: Sequence[float], blocks: int) -> list[Float[Array, 'B X D']]:
    """Return the current unit's tokens after some of the blocks.

    Args:
      depths: shares of the depth.
      blocks: of the denoiser.
    """
    current = features.last.shape[1]
    after = [features.after.image[index][:, -current:] for index in range(blocks - 1)] + [features.last]
    return [after[max(math.ceil(depth * blocks), 1) - 1] for depth in depths]


def critic_loss(real: Float[Array, ' B'], generated: Float[Array, ' B']) -> Float[Array, ' B']:
    """Return the critic's loss of every sample, from its logits."""
    return jax.nn.softplus(-real) + jax.nn.softplus(generated)


def squared_slope(there: Float[Array, ' B'], here: Float[Array, ' B'], step: float) -> Float[Array, ' B']:
    """Return the squared difference quotient of the critic's logits along noise of deviation `step`."""
    return jnp.square((there - here) / step)


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """The student's side of the adversarial objective."""

    config: AdversarialConfig
    name: str = 'adversarial'

    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Draws:
        """Draw a level and the noise of the probe."""
        tau_key, noise_key = jax.random.split(jax.random.fold_in(key, 1))
        return {'tau': jax.random.uniform(tau_key, shape[:1]), 'noise': jax.random.normal(noise_key, shape)}

    def gradient(
        self, examples: Examples, stage: int, example: Example, z_theta: Unit, models: Models, draws: Any
    ) -> tuple[Unit, Values]:
        """Return the gradient of softplus(-C), through the fake model's features, and the logit."""
        assert models.critic is not None, 'the program makes a critic for this objective'
        critic = models.critic

        def loss(z: Unit) -> tuple[Float[Array, ' B'], Float[Array, ' B']]:
            logit = critic(example, stage, examples.probe(z, stage, draws['tau'], draws['noise']))
            return jax.nn.softplus(-logit), logit

        values, pull_back, logit = jax.vjp(loss, z_theta, has_aux=True)
        return pull_back(jnp.ones_like(values))[0], {'student_logit': logit}
