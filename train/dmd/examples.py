"""The tasks of the step distillation (`train.dmd`), and what is logged of them.

Legend: B batch, T latent frames (= units), h w the stage's grid, C channels, L text tokens, D width.
Source: Neodragon, arXiv 2511.06055, section on step distillation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neodragon_jax.pyramid.sampler import Denoiser, Prompt, Unit
from train.flow import flow_matching


class Example(NamedTuple):
    """A batch of the student's tasks at one stage, each at its own unit."""

    unit: Int[Array, ' B']
    history: list[Unit]
    clean: Unit  # z at the stage's resolution
    prompt: Prompt

    def ask(self, denoise: Denoiser, stage: int, x: Unit, timestep: Float[Array, ' B']) -> Unit:
        """Return a denoiser's flow at x, in float32 whatever it is computed in."""
        return denoise(stage, self.history, x, self.unit, self.prompt, timestep).astype(jnp.float32)


class Probe(NamedTuple):
    """The re-noised student prediction z_tau, and the pair it lies on."""

    x: Unit
    flow: Unit  # y0 - y1
    timestep: Float[Array, ' B']


def prompt_of(batch: Mapping[str, Array]) -> Prompt:
    """Return the prompts of a batch of samples."""
    return Prompt(batch['text'], batch['text_mask'], batch['pooled'])


def student_metrics(
    values: Mapping[str, Float[Array, ' B']], unit: Int[Array, ' B'], stage: int, frames: int, first_unit: int
) -> dict[str, Array]:
    """Return means over a batch as NAME, and over its examples at each unit as NAME/stage{s}/unit{u}.

    Args:
      values: one of them may be `direction_square`, of which the roots of the means are told, as `direction_rms`.
      first_unit: below it there are no examples.
    """
    metrics = {name: jnp.mean(value) for name, value in values.items()}
    for name, value in values.items():
        metrics |= by_unit(name, flow_matching.unit_sums(value, unit, frames), stage, first_unit)
    square, rms = 'direction_square', 'direction_rms'
    roots = {name.replace(square, rms): jnp.sqrt(value) for name, value in metrics.items() if square in name}
    return {name: value for name, value in metrics.items() if square not in name} | roots


def by_unit(name: str, sums: Float[Array, '2 T'], stage: int, first_unit: int) -> dict[str, Array]:
    """Return the means of `flow_matching.unit_sums` from a unit on, NaN where no example has the unit."""
    means = flow_matching.unit_means(sums, f'{name}/stage{stage}')
    return dict(list(means.items())[first_unit:])
