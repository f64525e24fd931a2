"""Guidance scales of the teacher."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def scale_by_unit(guidance: float, first_guidance: float) -> Callable[[Int[Array, ' B']], Float[Array, ' B']]:
    """Return the guidance scale as a function of each sample's unit.

    Args:
      guidance: scale of units > 0.
      first_guidance: scale of unit 0.
    """
    return lambda unit: jnp.where(unit == 0, first_guidance, guidance)
