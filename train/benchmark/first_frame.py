"""The report's section on the first frame: every system with a generated and with a given one.

A student of one step per stage generates unit 0 from noise alone, without a history. The paper leaves it to a
text-to-image model, Neodragon, arXiv 2511.06055, section on the first frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train.benchmark.evidence import GENERATED, GIVEN, Evidence
from train.benchmark.figures import Rows

# Attributes whose accuracy is compared.
COLUMNS = ('shape', 'all')


def first_frame_table(seen: Sequence[Evidence], estimate: Any) -> list[str]:
    """Return a row per system: accuracy with frames of both kinds, and the points that a given one gains.

    Args:
      estimate: function from a number of the evidence to its mean and error, see `statistics.Estimator`.
    """
    titles = [f'{column}, {part}' for column in COLUMNS for part in ('generated', 'given', 'points gained')]
    lines = ['## The first frame', '', f'| system | {" | ".join(titles)} |', f'|---{"|---:" * len(titles)}|']
    for system in _systems(seen):
        cells = []
        for column in COLUMNS:
            mean = lambda one, first, c=column, s=system: one.mean(s, c, first)
            cells += [estimate(lambda one, first=first, mean=mean: mean(one, first)) for first in (GENERATED, GIVEN)]
            cells.append(estimate(lambda one, mean=mean: 100 * (mean(one, GIVEN) - mean(one, GENERATED))))
        lines.append(f'| {system} | {" | ".join(map(str, cells))} |')
    return [*lines, '']


def first_frame_rows(seen: Sequence[Evidence], estimate: Any) -> Rows:
    """Return the accuracies of every system with frames of both kinds.

    Args:
      estimate: as in `first_frame_table`.
    """
    of = lambda system, column, first: estimate(lambda one: one.mean(system, column, first))
    return Rows(
        {
            f'{column} right': {
                f'first frame {first}': {system: of(system, column, first) for system in _systems(seen)}
                for first in (GENERATED, GIVEN)
            }
            for column in COLUMNS
        }
    )


def _systems(seen: Sequence[Evidence]) -> list[str]:
    """Return the names of the systems that generate behind a given first frame."""
    ending = f'/{GIVEN}'
    return [name.removesuffix(ending) for name in seen[0].results if name.endswith(ending)]
