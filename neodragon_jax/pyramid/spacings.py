"""Names of the spacings of a stage's timesteps; apart from `schedule`, so that reading options does not import JAX."""

from __future__ import annotations

SPACINGS = ('released', 'even')
