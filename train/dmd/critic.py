"""Critic on the features of the fake model.

Legend: B batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.pyramid.sampler import Unit
from train.dmd.examples import Example, Probe
from train.dmd.objectives.adversarial import AdversarialConfig, Critic, critic_layers
from train.pruning.features import observer, with_features


@dataclasses.dataclass(frozen=True)
class FeatureCritic:
    """A critic that reads the fake model's features.

    Attributes:
      module: the fake model.
    """

    config: AdversarialConfig
    module: PyramidMMDiT

    @property
    def network(self) -> Critic:
        """The critic's own network."""
        return Critic(self.config.registers)

    def init(self, key: PRNGKeyArray) -> Any:
        """Return fresh parameters of the critic."""
        tokens = jnp.zeros((1, 1, self.module.config.width))
        return self.network.init(key, [tokens] * len(self.config.depths))['params']

    def judge(
        self, fake: Any, critic: Any, example: Example, stage: int, probe: Probe
    ) -> tuple[Unit, Float[Array, ' B']]:
        """Return the fake model's flow at a probe, in float32, and the critic's logits."""
        observe = observer(with_features(self.module), fake)
        flow, features = observe(stage, example.history, probe.x, example.unit, example.prompt, probe.timestep)
        layers = critic_layers(features, self.config.depths, self.module.config.num_layers)
        logit: Any = self.network.apply({'params': critic}, layers)
        return flow.astype(jnp.float32), logit

    def logit(self, fake: Any, critic: Any, example: Example, stage: int, probe: Probe) -> Float[Array, ' B']:
        """Return the critic's logits at a probe."""
        return self.judge(fake, critic, example, stage, probe)[1]
