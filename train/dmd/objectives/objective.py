"""The interface of an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float, PRNGKeyArray

from neodragon_jax.pyramid.sampler import Denoiser, Unit
from train.dmd.examples import Draws, Example, Examples, Probe
from train.dmd.ramp import Weight

Values = dict[str, Float[Array, ' B']]


CriticLogit = Callable[[Example, int, Probe], Float[Array, ' B']]


class Models(NamedTuple):
    """The models of a step; no gradient reaches their parameters through an objective."""

    student: Denoiser  # `jax.jvp` differentiates it
    fake: Denoiser
    teacher: Denoiser  # guided
    critic: CriticLogit | None = None  # for the adversarial objective
    start: Denoiser | None = None  # from which the student starts, for progressive distillation


class Objective(Protocol):
    """One objective of the student."""

    @property
    def name(self) -> str: ...

    @property
    def config(self) -> Weight: ...

    def draw(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Draws:
        """Draw the objective's random numbers.

        Args:
          key: of the update; `jax.random.split(key, 3)[0]` is used by the examples.
          shape: of the clean predictions, [B, 1, h, w, C].
        """
        ...

    def gradient(
        self, examples: Examples, stage: int, example: Example, z_theta: Unit, models: Models, draws: Any
    ) -> tuple[Unit, Values]:
        """Return the gradient of each sample's loss by its `z_theta`, and values to log per sample.

        Args:
          z_theta: detached clean predictions [B, 1, h, w, C], in float32.
          draws: the result of `draw`.
        """
        ...
