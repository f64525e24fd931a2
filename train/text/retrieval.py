"""Whether embeddings find their own counterparts among many.

Legend: N prompts, D width.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def ranks(student: Float[np.ndarray, 'N D'], teacher: Float[np.ndarray, 'N D']) -> Int[np.ndarray, ' N']:
    """Return for every student embedding how many teacher embeddings are nearer than its own; 0 is right.

    Distances are Euclidean, in float64; equal ones, as of a prompt that is there twice, do not count.
    """
    a, b = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    squares = (a**2).sum(axis=1)[:, None] - 2 * a @ b.T + (b**2).sum(axis=1)
    own = np.diag(squares)[:, None]
    # Equal up to rounding is equal.
    slack = 1e-12 * (np.abs(own) + (a**2).sum(axis=1)[:, None])
    return (squares < own - slack).sum(axis=1)


def retrieval(student: Float[np.ndarray, 'N D'], teacher: Float[np.ndarray, 'N D']) -> dict[str, float]:
    """Return the share of embeddings that are nearest to their own counterpart, and the mean rank of these, from 1."""
    found = ranks(student, teacher)
    return {'retrieval/top1': float(np.mean(found == 0)), 'retrieval/mean_rank': float(np.mean(found)) + 1}
