"""On-policy examples: part of a batch has a history that the student generated.

A student trained only on the data's history may keep motion after that history and lose it after its own. Once per
iteration a few prompts are rolled out; every roll-out then serves examples at several units, in the updates of the
fake model and of the student alike.

Legend: N updates in an iteration, B batch, R roll-outs, T latent frames (= units), H W latent grid, C channels.
Source: Self Forcing, arXiv 2506.08009.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from neodragon_jax.pyramid.sampler import Denoiser
from train.dmd.examples import prompt_of
from train.dmd.ramp import ramp
from train.dmd.rollout import RolledOut, Rollout, drawn_noise
from train.runtime.settings import check_range

Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class OwnHistoryConfig:
    """The share of the examples with the student's own history, by step.

    The share is `first` up to step `ramp_start`, then moves to `last` within `ramp_steps` steps. 0 throughout, the
    default, is the paper's objective.

    Attributes:
      first, last: the share at the start and at the end, in 0..1.
      ramp_start: step up to which the share is `first`.
      ramp_steps: steps in which it moves to `last`; 0 jumps.
      videos: R, videos rolled out per iteration, of the first prompts of its first batch; 0 for the whole batch. The
        examples on a roll-out use its prompt and the data's video for that prompt.
      arrive: these examples start at the student's own state, instead of a noisy latent of the data.
    """

    first: float = 0.0
    last: float = 0.0
    ramp_start: int = 0
    ramp_steps: int = 0
    videos: int = 0
    arrive: bool = True

    def __post_init__(self) -> None:
        check_range(self, 'first', 'last', least=0, most=1)
        check_range(self, 'ramp_start', 'ramp_steps', 'videos', least=0)

    @property
    def enabled(self) -> bool:
        """Whether any step may use own history."""
        return bool(self.first or self.last)

    def share(self, step: Int[Array, ''] | int) -> Float[Array, '']:
        """Return the share at a step."""
        return ramp(step, self.first, self.last, self.ramp_start, self.ramp_steps)


@dataclasses.dataclass(frozen=True)
class OwnHistories:
    """Replaces part of the examples of an iteration by on-policy ones."""

    config: OwnHistoryConfig
    rollout: Rollout
    first_unit: int

    def attach(
        self,
        denoise: Denoiser,
        step: Int[Array, ''],
        stage: int,
        batch: Batch,
        unit: Int[Array, 'N B'],
        index: Int[Array, 'N B'],
        key: PRNGKeyArray,
    ) -> Batch:
        """Return the batches of an iteration with `own` [N, B], `history` [N, B, T, H, W, C] and `arrival`.

        Args:
          denoise: the student.
          stage: stage of the iteration.
          batch: latents [N, B, T, H, W, C], text, text_mask, pooled.
          unit, index: unit and step of every example.
        """
        own_key, noise_key = jax.random.split(key)
        own = jax.random.bernoulli(own_key, self.config.share(step), unit.shape)
        count = self.config.videos or unit.shape[1]
        rows = {name: array[0, :count] for name, array in batch.items()}
        rows['latents'] = rows['latents'].astype(jnp.float32)
        last = jnp.max(jnp.where(own, unit, self.first_unit - 1))
        noise = drawn_noise(noise_key, count, self.rollout.schedule)

        def generate(last: Int[Array, '']) -> RolledOut:
            return self.rollout.generate(denoise, prompt_of(rows), rows['latents'], self.first_unit, last, stage, noise)

        # Nothing is generated where no example is drawn.
        shapes = jax.eval_shape(generate, last)
        nothing = lambda _: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        rolled = jax.lax.stop_gradient(jax.lax.cond(jnp.any(own), generate, nothing, last))
        row = jnp.broadcast_to(jnp.arange(unit.shape[1]) % count, unit.shape)
        batch = {name: _chosen(own, rows[name][row], array) for name, array in batch.items()}
        batch['history'] = _chosen(own, rolled.videos[row], batch['latents'].astype(jnp.float32))
        if self.config.arrive:
            batch['arrival'] = rolled.states[index, unit, row][:, :, None]
        return batch | {'own': own}


def _chosen(own: Bool[Array, 'N B'], there: Array, here: Array) -> Array:
    """Return `there` for own examples and `here` for the others, in the type of `here`."""
    return jnp.where(own.reshape(*own.shape, *[1] * (here.ndim - 2)), there.astype(here.dtype), here)
