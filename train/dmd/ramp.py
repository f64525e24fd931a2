"""Values that change with the steps of a run, along a straight line."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neodragon_jax.base.errors import InputError
from train.flow.flow_matching import check_weights
from train.runtime.settings import check_range


def ramp(step: Int[Array, ''] | int, first: float, last: float, ramp_start: int, ramp_steps: int) -> Float[Array, '']:
    """Return `first` up to step `ramp_start`, then a straight line to `last` within `ramp_steps` steps.

    Without a ramp (`ramp_steps` 0) the value jumps to `last` at `ramp_start`.
    """
    done = (jnp.asarray(step, jnp.float32) - ramp_start) / max(ramp_steps, 1)
    # A ramp of one step reaches `last` one step after `ramp_start`; a jump reaches it at `ramp_start`.
    done = jnp.clip(done, 0, 1) if ramp_steps else (done >= 0).astype(jnp.float32)
    return first + (last - first) * done


@dataclasses.dataclass(frozen=True)
class Weight:
    """The factor of an objective, by stage and step.

    Attributes:
      weight: factor of the objective; 0 leaves it out.
      stages: further factor of each stage, coarsest first; () for 1 everywhere.
      decayed: share of the weight that remains after the ramp.
      ramp_start, ramp_steps: when the ramp begins and how long it takes, in steps; the weight is constant by default.
    """

    weight: float = 0.0
    stages: tuple[float, ...] = ()
    decayed: float = 1.0
    ramp_start: int = 0
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        check_range(self, 'weight', 'decayed', 'ramp_start', 'ramp_steps', 'stages', least=0)
        check_weights('stages', self.stages, count=3)
        if self.decayed == 1.0 and (self.ramp_start or self.ramp_steps):
            raise InputError(
                f'ramp_start is {self.ramp_start} and ramp_steps {self.ramp_steps}, but decayed is 1: the weight stays '
                'as it is; lower decayed.'
            )

    @property
    def used(self) -> bool:
        """Whether the objective is active in any step."""
        return self.weight > 0 and (not self.stages or max(self.stages) > 0)

    def at(self, stage: int, step: Int[Array, ''] | int) -> Float[Array, ''] | float:
        """Return the factor at a stage and a step: a Python number where it does not change with the steps."""
        factor = self.weight * (self.stages[stage] if self.stages else 1.0)
        if self.decayed == 1.0:
            return factor
        return factor * ramp(step, 1.0, self.decayed, self.ramp_start, self.ramp_steps)
