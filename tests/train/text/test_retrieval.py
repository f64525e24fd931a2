"""Retrieval metrics of the text distillation."""

from __future__ import annotations

import numpy as np

from train.text.retrieval import ranks, retrieval


def test_retrieval():
    teacher = np.asarray([[0.0, 0], [1, 0], [0, 1], [5, 5]])
    student = np.asarray([[0.1, 0], [0.2, 0], [0, 3], [9, 9]])
    assert ranks(student, teacher).tolist() == [0, 1, 0, 0]
    assert retrieval(student, teacher) == {'retrieval/top1': 0.75, 'retrieval/mean_rank': 1.25}
    # A repeated prompt cannot be distinguished from its copy.
    assert ranks(teacher[[0, 0, 1]], teacher[[0, 0, 1]]).tolist() == [0, 0, 0]
    rng = np.random.default_rng(0)
    random = rng.standard_normal((2, 300, 8))
    assert 0 <= retrieval(*random)['retrieval/top1'] < 0.03
    assert retrieval(random[0] + 0.01, random[0])['retrieval/top1'] == 1
