"""Names of the spacings of a stage's timesteps; not in `schedule`, so that parsing options does not import JAX."""

from __future__ import annotations

SPACINGS = ('released', 'even')
