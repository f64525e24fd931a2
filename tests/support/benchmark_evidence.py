"""A chain of the benchmark, and evidence of systems that are perfect but for single numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from train.benchmark.evidence import CLIPS, COMBINATIONS, GENERATED, GIVEN, Evidence
from train.benchmark.tiers import TIERS
from train.benchmark.whole_chain import WholeChain
from train.shapes.attributes import columns


def chain(tmp_path, tier='cpu') -> WholeChain:
    return WholeChain(TIERS[tier], tmp_path, 0)


def evidence(held_out, teacher=1.0, student=1.0) -> Evidence:
    """Return results in which every system is perfect, but for its shape mismatch."""
    perfect = {name: list(value) for name, value in held_out(held_out.drawn).items()}
    results = {'drawn': perfect}
    for name in NAMES:
        mismatch = {'student': student, 'teacher_1': 1.0, 'text': teacher}.get(name, 0.1)
        for first in (GENERATED, GIVEN):
            results[f'{name}/{first}'] = perfect | {'mismatch': [mismatch, 0.0]}
    results['native'] = perfect | {'psnr_db': 33.0, 'decoder_parameters': 3000}
    results['small'] = perfect | {'psnr_db': 32.0, 'decoder_parameters': 200}
    return Evidence(results, {'text': 0.99, 'text_without_cosine': 0.98}, 0.5, True)


NAMES = (
    'teacher', 'text', 'text_without_cosine', 'pruned_stage1', 'pruned', 'pruned_stage2_alone', 'teacher_1', 'student',
    'regression', 'paper',
)  # fmt: skip


def recorded(held_out, seeds: int, system: str = 'student') -> list[Evidence]:
    """Return evidence in which a system is wrong in single combinations, with the clips of every system."""
    combinations = held_out.combinations
    perfect = columns(held_out.read(held_out.drawn))
    seen = []
    for seed in range(seeds):
        results: dict[str, Any] = dict(evidence(held_out, teacher=0.2, student=0.2).results)
        for name, old in results.items():
            found = perfect
            if name.startswith(f'{system}/'):
                right = [float(combination % 3 != seed) for combination in combinations]
                found = perfect | {'shape': right, 'all': right}
            means = {column: [float(np.mean(values)), 0.0] for column, values in found.items() if column != 'mismatch'}
            results[name] = old | means | {CLIPS: found, COMBINATIONS: combinations}
        seen.append(Evidence(results, {'text': 0.99, 'text_without_cosine': 0.98}, 0.5, True))
    return seen
