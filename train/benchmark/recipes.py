"""The report's table of recipes: the losses of a student of each recipe against its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from train.benchmark.evidence import GENERATED, GIVEN, Evidence
from train.benchmark.figures import Rows

COLUMNS = ('shape', 'all', 'mismatch', 'motion', 'saturation')
DRAWN_COLUMNS = {'shape': 'shape right', 'steady': 'shape steady', 'mismatch': 'shape mismatch'}


def recipe_table(seen: Sequence[Evidence], estimate: Any, students: Sequence[str], teacher: str) -> list[str]:
    """Return the report's section: the teacher and a row per recipe, each with a first frame of both kinds.

    Args:
      estimate: function from a number of the evidence to its mean and error, see `statistics.Estimator`.
      teacher: name of the system that the students learn from.
    """
    lines = ['## Recipes', '', 'Every student has one step per stage, but "even", which has 2-2-1.', '']
    lines += [
        f'| recipe | first frame | points of shape lost | mismatch beyond {students[0]} | {" | ".join(COLUMNS)} |'
    ]
    lines += [f'|---|---|---:|---:{"|---:" * len(COLUMNS)}|']
    for first in (GENERATED, GIVEN):
        for name in (teacher, 'teacher_1', *students):
            mean = lambda one, column, name=name, first=first: one.mean(name, column, first)
            lost = lambda one, mean=mean, first=first: 100 * (one.mean(teacher, 'shape', first) - mean(one, 'shape'))
            beyond = lambda one, mean=mean, first=first: (
                mean(one, 'mismatch') - one.mean(students[0], 'mismatch', first)
            )
            cells = [estimate(lost), estimate(beyond)]
            cells += [estimate(lambda one, column=column, mean=mean: mean(one, column)) for column in COLUMNS]
            lines.append(f'| {_title(name, teacher)} | {first} | {" | ".join(map(str, cells))} |')
    return [*lines, '']


def recipe_rows(estimate: Any, students: Sequence[str], teacher: str) -> Rows:
    """Return the numbers of the teacher and of every recipe, for a first frame of both kinds.

    Args:
      estimate, teacher: as in `recipe_table`.
    """
    of = lambda name, column, first: estimate(lambda one: one.mean(name, column, first))
    names = (teacher, 'teacher_1', *students)
    return Rows(
        {
            title: {
                f'first frame {first}': {_title(name, teacher): of(name, column, first) for name in names}
                for first in (GENERATED, GIVEN)
            }
            for column, title in DRAWN_COLUMNS.items()
        }
    )


def _title(name: str, teacher: str) -> str:
    """Return how a system is shown."""
    return {teacher: 'teacher', 'teacher_1': 'teacher at 1-1-1'}.get(name, name)
