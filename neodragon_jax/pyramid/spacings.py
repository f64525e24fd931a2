"""Limits of a stage's timesteps; not in `schedule`, so that parsing options does not import JAX."""

from __future__ import annotations

from typing import Literal, get_args

Spacing = Literal['released', 'even']
SPACINGS: tuple[str, ...] = get_args(Spacing)
# The noise levels of the training; more steps than levels are a mistyped number.
MAX_STEPS = 1000
