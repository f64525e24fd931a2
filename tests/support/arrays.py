"""Random arrays of tests."""

from __future__ import annotations

import numpy as np


def normal(seed: int, *shape: int) -> np.ndarray:
    """Return standard normal numbers in float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
