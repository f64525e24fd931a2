"""Critic on the features of the fake model.

Legend: B batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.pyramid.sampler import Unit
from train.dmd.examples import Example, Probe
from train.dmd.objectives.adversarial import (
    AdversarialConfig,
    Critic,
    critic_layers,
    critic_loss,
    squared_slope,
)
from train.dmd.objectives.objective import Values
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

    def flow_and_logit(
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
        return self.flow_and_logit(fake, critic, example, stage, probe)[1]

    def losses(
        self,
        trained: tuple[Any, Any],
        example: Example,
        stage: int,
        generated: Probe,
        real: Probe,
        slope_noise: Mapping[str, Array],
    ) -> tuple[Unit, Float[Array, ' B'], Values]:
        """Return the fake model's flow at the generated probe, the critic's loss of every sample, and values to log.

        The data is judged behind its own history, also where the student's prediction has the student's history: behind
        the latter, the data's frame is not what follows.

        Args:
          trained: parameters of the fake model and of the critic.
          generated, real: the student's predictions and the data, with the same level and noise.
          slope_noise: white noise for 'r1' and 'r2', where their weights are not 0.
        """
        flow, logit = self.flow_and_logit(*trained, example, stage, generated)
        of_data = example._replace(history=example.data_history)
        _, real_logit = self.flow_and_logit(*trained, of_data, stage, real)
        loss = critic_loss(real_logit, logit)
        values = {'critic': loss, 'real_logit': real_logit, 'fake_logit': logit}
        step = self.config.slope_step
        for name, given, probe, here in (('r1', of_data, real, real_logit), ('r2', example, generated, logit)):
            if name in slope_noise:
                there = self.logit(*trained, given, stage, probe._replace(x=probe.x + step * slope_noise[name]))
                values[f'{name}_slope'] = squared_slope(there, here, step)
                loss = loss + getattr(self.config, name) * values[f'{name}_slope']
        return flow, loss, values

    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> dict[str, Array]:
        """Draw the noise of the slope terms that are in use; `shape` is that of a probe."""
        keys = zip(('r1', 'r2'), jax.random.split(key), strict=True)
        return {name: jax.random.normal(key, shape) for name, key in keys if getattr(self.config, name)}
