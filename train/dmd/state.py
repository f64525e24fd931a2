"""The trained state of the step distillation."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array


@flax.struct.dataclass
class DMDState:
    """Both trained models in float32, stacked for the scan, and their optimizers."""

    step: Array
    student: Any
    fake: Any
    student_opt: Any
    fake_opt: Any

    @classmethod
    def begin(
        cls, teacher: Any, student_tx: optax.GradientTransformation, fake_tx: optax.GradientTransformation
    ) -> DMDState:
        """Return both models as copies of the teacher, with fresh optimizers."""
        # Real copies: the state's buffers are donated to every step, the teacher's must survive.
        student, fake = (jax.tree.map(jnp.copy, teacher) for _ in range(2))
        return cls(jnp.zeros((), jnp.int32), student, fake, student_tx.init(student), fake_tx.init(fake))
