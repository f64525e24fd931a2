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
from train.dmd.objectives.objective import Models, Objective
from train.flow import losses
from train.flow.guidance import scale_by_unit

Batch = Mapping[str, Array]

# Prefix of the random numbers of a fake model's update, and number of the critic's noise among its draws.
FAKE, SLOPES = 'fake/', 3


@dataclasses.dataclass(frozen=True)
class Updates:
    """The losses of both models.

    Attributes:
      apply: apply function of the student and of the fake model, see `sampler.jax_denoiser`.
      probe_apply: the fake model's where it is compared with the teacher, perhaps in another precision.
      teacher_apply: the teacher's.
      parts: the student's objectives.
      guidance, first_guidance: the teacher's scales for units > 0 and for unit 0.
      critic: critic of the adversarial objective, or None.
      tangent_apply: the student's where objectives differentiate it in forward mode; None for `apply`.
    """

    apply: Callable[..., Any]
    probe_apply: Callable[..., Any]
    teacher_apply: Callable[..., Any]
    examples: Examples
    parts: Sequence[Objective]
    guidance: float
    first_guidance: float
    critic: FeatureCritic | None = None
    tangent_apply: Callable[..., Any] | None = None

    def denoiser(self, params: Any) -> Denoiser:
        """Return the student or the fake model as a function."""
        return jax_denoiser(self.apply, params)

    def teacher(self, frozen: Mapping[str, Any]) -> Denoiser:
        """Return the guided teacher as a function."""
        scale = scale_by_unit(self.guidance, self.first_guidance)
        denoise = jax_denoiser(self.teacher_apply, jax.lax.stop_gradient(frozen['teacher']))
        return guided(denoise, frozen['negative'], scale)

    def draw_fake(self, stage: int, shape: tuple[int, ...], key: PRNGKeyArray) -> Draws:
        """Draw the random numbers of one update of the fake model; `shape` is that of the latents."""
        _, tau_key, noise_key = jax.random.split(key, 3)
        unit_shape = self.examples.stage_shape(stage, shape)
        draws = {'tau': jax.random.uniform(tau_key, shape[:1]), 'noise': jax.random.normal(noise_key, unit_shape)}
        if self.critic is not None:
            draws |= self.critic.draw(jax.random.fold_in(key, SLOPES), unit_shape)
        return {f'{FAKE}{name}': value for name, value in draws.items()}

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
        examples, fake = self.examples, trained[0]
        example = examples.build(stage, batch, batch)
        z_theta = jax.lax.stop_gradient(examples.predict(self.denoiser(student), stage, example))
        draws = {name.removeprefix(FAKE): value for name, value in batch.items() if name.startswith(FAKE)}
        tau, noise = draws.pop('tau'), draws.pop('noise')
        probe = examples.probe(z_theta, stage, tau, noise)
        if self.critic is None:
            errors = losses.squared_error(
                example.predict_flow(self.denoiser(fake), stage, probe.x, probe.timestep), probe.flow
            )
            return jnp.mean(errors), unit_sums({'fake_mse': errors}, example.unit, examples.frames)
        real = examples.probe(example.clean, stage, tau, noise)
        flow, adversarial, values = self.critic.losses(trained, example, stage, probe, real, draws)
        errors = losses.squared_error(flow, probe.flow)
        loss = jnp.mean(errors) + self.critic.config.at(stage, step) * jnp.mean(adversarial)
        return loss, unit_sums({'fake_mse': errors} | values, example.unit, examples.frames)

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
        models = Models(
            student=jax_denoiser(self.tangent_apply or self.apply, detached(student)),
            fake=jax_denoiser(self.probe_apply, fake),
            teacher=self.teacher(frozen),
            critic=None if self.critic is None else functools.partial(self.critic.logit, fake, critic),
            start=self.denoiser(detached(start)) if (start := frozen.get('start')) is not None else None,
        )
        slope, values = weighted.gradient(self.parts, self.examples, stage, step, example, z_theta, models, batch)
        return losses.surrogate(z_theta, slope), unit_sums(values, example.unit, self.examples.frames)
