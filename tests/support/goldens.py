"""Golden arrays of the reference implementation, and their comparison with the project's."""

from __future__ import annotations

import pathlib

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent.parent
GOLDENS = ROOT / 'tests' / 'goldens'
TINY_CHECKPOINT = GOLDENS / 'tiny_checkpoint'


def relative_error(got, want) -> float:
    """Return |got - want| / |want| in the Euclidean norm, in float64."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def channels_last(video: np.ndarray) -> np.ndarray:
    """Return the golden layout [B, C, T, H, W] as [B, T, H, W, C]."""
    return np.moveaxis(video, 1, -1)


def load_golden(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of tests/goldens/{name}/golden.npz by name."""
    with np.load(GOLDENS / name / 'golden.npz') as arrays:
        return dict(arrays)
