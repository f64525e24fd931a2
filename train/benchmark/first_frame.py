"""The report's section on the first frame: every system with a generated and with a given one.

A student of one step per stage generates unit 0 from noise alone, without a history. The paper leaves it to a
text-to-image model, Neodragon, arXiv 2511.06055, section on the first frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train.benchmark.evidence import GENERATED, GIVEN, Evidence
from train.benchmark.figures import Rows
from train.shapes.world import Traits

# Shares of clips, which a given frame should raise, and a number that it should lower.
SHARES, LOWERED = ('shape', 'all', 'steady'), ('mismatch',)


def first_frame_table(seen: Sequence[Evidence], estimate: Any) -> list[str]:
    """Return a row per system: numbers with frames of both kinds, and what a given one gains.

    Args:
      estimate: function from a number of the evidence to its mean and error, see `statistics.Estimator`.
    """
    columns = _columns(seen)
    gained = {column: 'points gained' if column in SHARES else 'lowered by' for column in columns}
    titles = [f'{column}, {part}' for column in columns for part in ('generated', 'given', gained[column])]
    lines = ['## The first frame', '', f'| system | {" | ".join(titles)} |', f'|---{"|---:" * len(titles)}|']
    for system in _systems(seen):
        cells = []
        for column in columns:
            mean = lambda one, first, c=column, s=system: one.mean(s, c, first)
            scale = 100 if column in SHARES else -1
            cells += [estimate(lambda one, first=first, mean=mean: mean(one, first)) for first in (GENERATED, GIVEN)]
            cells.append(estimate(lambda one, mean=mean, k=scale: k * (mean(one, GIVEN) - mean(one, GENERATED))))
        lines.append(f'| {system} | {" | ".join(map(str, cells))} |')
    return [*lines, '']


def first_frame_rows(seen: Sequence[Evidence], estimate: Any) -> Rows:
    """Return the numbers of every system with frames of both kinds.

    Args:
      estimate: as in `first_frame_table`.
    """
    of = lambda system, column, first: estimate(lambda one: one.mean(system, column, first))
    return Rows(
        {
            f'{column} right' if column in Traits._fields else column: {
                f'first frame {first}': {system: of(system, column, first) for system in _systems(seen)}
                for first in (GENERATED, GIVEN)
            }
            for column in _columns(seen)
            if column != 'all'
        }
    )


def _columns(seen: Sequence[Evidence]) -> list[str]:
    """Return the numbers that all results have; the oldest lack some."""
    results = [
        one.results[f'{system}/{first}'] for one in seen for system in _systems(seen) for first in (GENERATED, GIVEN)
    ]
    return [column for column in (*SHARES, *LOWERED) if all(column in result for result in results)]


def _systems(seen: Sequence[Evidence]) -> list[str]:
    """Return the names of the systems that generate behind a given first frame."""
    ending = f'/{GIVEN}'
    return [name.removesuffix(ending) for name in seen[0].results if name.endswith(ending)]
