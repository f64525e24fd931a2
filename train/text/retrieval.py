"""Retrieval metrics: ranks of the student's embeddings among those of the teacher.

Legend: N prompts, D width.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def ranks(student: Float[np.ndarray, 'N D'], teacher: Float[np.ndarray, 'N D']) -> Int[np.ndarray, ' N']:
    """Return for every student embedding the number of teacher embeddings that are nearer than its counterpart.

    Rank 0 is correct. Distances are Euclidean, in float64. Equal distances, as of duplicate prompts, do not count.
    """
    a, b = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    squares = (a**2).sum(axis=1)[:, None] - 2 * a @ b.T + (b**2).sum(axis=1)
    own = np.diag(squares)[:, None]
    # Distances that differ only by rounding count as equal.
    slack = 1e-12 * (np.abs(own) + (a**2).sum(axis=1)[:, None])
    return (squares < own - slack).sum(axis=1)


def retrieval(student: Float[np.ndarray, 'N D'], teacher: Float[np.ndarray, 'N D']) -> dict[str, float]:
    """Return the share of embeddings nearest to their counterpart (top 1), and the mean rank, from 1."""
    found = ranks(student, teacher)
    return {'retrieval/top1': float(np.mean(found == 0)), 'retrieval/mean_rank': float(np.mean(found)) + 1}
