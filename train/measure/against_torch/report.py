"""The table of a comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from train.measure.against_torch.case import Case, Measured

JAX, TORCH = 'jax', 'torch'


def table(case: Case, rounds: Mapping[str, Sequence[Measured]]) -> str:
    """Return a Markdown report: the median and the range of every measurement over all rounds.

    Args:
      rounds: results of the rounds by side.
    """
    lines = [
        f'# {case.layers} blocks of width {case.heads * case.head_dim}, batch {case.batch}, {case.dtype}',
        '',
        *(_side(side, results) for side, results in rounds.items()),
        '',
        '| measured | stage | image tokens | JAX s | PyTorch s | PyTorch / JAX |',
        '|---|---|---|---|---|---|',
    ]
    for name in next(iter(rounds.values()))[0].seconds:
        measured, stage = name.split('/')
        times = {side: [run for result in results for run in result.seconds[name]] for side, results in rounds.items()}
        cells = [_times(times[side]) if side in times else '-' for side in (JAX, TORCH)]
        both = len(times) == 2
        ratio = f'{statistics.median(times[TORCH]) / statistics.median(times[JAX]):.2f}' if both else '-'
        lines.append(f'| {measured} | {stage} | {case.tokens(int(stage))[0]} | {" | ".join(cells)} | {ratio} |')
    return '\n'.join([*lines, ''])


def equal_sizes(rounds: Mapping[str, Sequence[Measured]]) -> bool:
    """Return whether the denoisers of all sides have the same number of parameters."""
    return len({result.parameters for results in rounds.values() for result in results}) == 1


def _side(side: str, results: Sequence[Measured]) -> str:
    """Return the line about a side."""
    first = results[0]
    versions = ', '.join(f'{name} {version}' for name, version in first.versions.items())
    memory = '' if first.peak_gb is None else f', peak {max(result.peak_gb or 0 for result in results):.1f} GB'
    compiling = sum(first.compile_s.values())
    return (
        f'* {side}: {first.device}, {versions}, {first.parameters:,} parameters{memory}, first runs {compiling:.0f} s'
    )


def _times(seconds: Sequence[float]) -> str:
    """Return the median and the range."""
    return f'{statistics.median(seconds):.4f} ({min(seconds):.4f} to {max(seconds):.4f})'
