"""The trained state of the step distillation, and the average of the student.

average <- student until `start`, then average + (1 - decay) (student - average)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from train.runtime.optimizer import Ema, EmaConfig, update_ema
from train.runtime.settings import check_range


@dataclasses.dataclass(frozen=True)
class AverageConfig:
    """The exponential moving average of the student, in float32.

    Attributes:
      decay: the share of the average that an update keeps; 0 for no average.
      start: updates after which the average begins; it equals the student before.
    """

    decay: float = 0.99
    start: int = 50

    def __post_init__(self) -> None:
        check_range(self, 'decay', least=0, below=1)
        check_range(self, 'start', least=0)


@flax.struct.dataclass
class DMDState:
    """Both trained models in float32, stacked for the scan, or their low-rank updates; and their optimizers.

    Attributes:
      critic: parameters of the adversarial objective's critic; {} without it.
      average: average of the student; None without averaging.
    """

    step: Array
    student: Any
    fake: Any
    student_opt: Any
    fake_opt: Any
    critic: Any = flax.struct.field(default_factory=dict)
    critic_opt: Any = None
    average: Any = None

    @classmethod
    def begin(
        cls, student: Any, fake: Any, student_tx: optax.GradientTransformation, fake_tx: optax.GradientTransformation
    ) -> DMDState:
        """Return the state of both models with fresh optimizers."""
        return cls(jnp.zeros((), jnp.int32), student, fake, student_tx.init(student), fake_tx.init(fake))

    @property
    def result(self) -> Any:
        """The student to be used: its average where there is one."""
        return self.student if self.average is None else self.average


def follow(average: Any, student: Any, step: Int[Array, ''], config: AverageConfig) -> Any:
    """Return the average after an update of the student.

    Args:
      step: number of updates before it.
    """
    moved = update_ema(Ema(average, jnp.zeros((), jnp.int32)), student, EmaConfig(config.decay, warmup=False)).params
    return jax.tree.map(lambda new, now: jnp.where(step < config.start, now, new), moved, student)
