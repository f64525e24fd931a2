"""The losses of the step distillation: of the fake model, and of the student.

Random numbers are drawn for a whole batch (`draw_fake`, `draw_student`) and stay with its rows, so that a batch may be
processed in parts.

Legend: B batch, T latent frames (= units).
Source: Neodragon, arXiv 2511.06055, section on step distillation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neodragon_jax.pyramid.sampler import Denoiser, guided, jax_denoiser
from train.dmd.critic import FeatureCritic
from train.dmd.examples import Draws, Examples
from train.dmd.metrics import Sums, unit_sums
from train.dmd.objectives import weighted
from train.dmd.objectives.adversarial import critic_loss
from train.dmd.objectives.objective import Models, Objective
from train.flow import losses
from train.flow.guidance import scale_by_unit

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Updates:
    """The losses of both models.

    Attributes:
      apply: the denoiser's apply function, see `sampler.jax_denoiser`.
      parts: the student's objectives.
      guidance, first_guidance: the teacher's scales for units > 0 and for unit 0.
      critic: critic of the adversarial objective, or None.
    """

    apply: Callable[..., Any]
    examples: Examples
    parts: Sequence[Objective]
    guidance: float
    first_guidance: float
    critic: FeatureCritic | None = None

    def denoiser(self, params: Any) -> Denoiser:
        """Return a copy of the denoiser as a function."""
        return jax_denoiser(self.apply, params)

    def draw_fake(self, stage: int, shape: tuple[int, ...], key: PRNGKeyArray) -> Draws:
        """Draw the random numbers of one update of the fake model; `shape` is that of the latents."""
        _, tau_key, noise_key = jax.random.split(key, 3)
        noise = jax.random.normal(noise_key, self.examples.stage_shape(stage, shape))
        return {'fake/tau': jax.random.uniform(tau_key, shape[:1]), 'fake/noise': noise}

    def draw_student(self, stage: int, shape: tuple[int, ...], key: PRNGKeyArray) -> Draws:
        """Draw the random numbers of the student's objectives."""
        return weighted.draw(self.parts, key, self.examples.stage_shape(stage, shape))

    def fake_loss(
        self,
        stage: int,
        step: Int[Array, ''] | int,
        student: Any,
        trained: tuple[Any, Any],
        batch: Batch,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ''], Sums]:
        """Return the loss of fake model and critic, and the unit sums of its metrics.

        The loss is flow matching on the student's detached prediction, plus the critic's loss if there is a critic.

        Args:
          trained: parameters of the fake model and of the critic.
          batch: rows of samples with their random numbers.
          key: not used.
        """
        del key
        examples, (fake, critic) = self.examples, trained
        example = examples.build(stage, batch, batch)
        z_theta = jax.lax.stop_gradient(examples.predict(self.denoiser(student), stage, example))
        probe = examples.probe(z_theta, stage, batch['fake/tau'], batch['fake/noise'])
        if self.critic is None:
            errors = losses.squared_error(
                example.predict_flow(self.denoiser(fake), stage, probe.x, probe.timestep), probe.flow
            )
            return jnp.mean(errors), unit_sums({'fake_mse': errors}, example.unit, examples.frames)
        real = examples.probe(example.clean, stage, batch['fake/tau'], batch['fake/noise'])
        flow, logit = self.critic.judge(fake, critic, example, stage, probe)
        _, real_logit = self.critic.judge(fake, critic, example, stage, real)
        errors, adversarial = losses.squared_error(flow, probe.flow), critic_loss(real_logit, logit)
        values = {'fake_mse': errors, 'critic': adversarial, 'real_logit': real_logit, 'fake_logit': logit}
        loss = jnp.mean(errors) + self.critic.config.at(stage, step) * jnp.mean(adversarial)
        return loss, unit_sums(values, example.unit, examples.frames)

    def student_loss(
        self,
        stage: int,
        step: Int[Array, ''] | int,
        trained: tuple[Any, Any],
        frozen: Mapping[str, Any],
        student: Any,
        batch: Batch,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ''], Sums]:
        """Return the student's surrogate loss (only its gradient is meaningful) and the unit sums of its metrics.

        Args:
          trained: parameters of the fake model and of the critic.
          batch: rows of samples with their random numbers.
          key: not used.
        """
        del key
        example = self.examples.build(stage, batch, batch)
        z_theta = self.examples.predict(self.denoiser(student), stage, example)
        detached = jax.lax.stop_gradient
        fake, critic = detached(trained)
        scale = scale_by_unit(self.guidance, self.first_guidance)
        models = Models(
            student=self.denoiser(detached(student)),
            fake=self.denoiser(fake),
            teacher=guided(self.denoiser(detached(frozen['teacher'])), frozen['negative'], scale),
            critic=None if self.critic is None else functools.partial(self.critic.logit, fake, critic),
        )
        slope, values = weighted.gradient(self.parts, self.examples, stage, step, example, z_theta, models, batch)
        return losses.surrogate(z_theta, slope), unit_sums(values, example.unit, self.examples.frames)
