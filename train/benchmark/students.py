"""The students of the benchmark: recipes of `configs/dmd.py`, and their further settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class Student:
    """One distillation.

    Attributes:
      recipe: of configs/dmd.py: the preset is shapes-RECIPE.
      settings: other settings.
      start: name of the student from which it starts; None for the teacher.
      steps, first_steps: per stage, of units > 0 and of unit 0.
    """

    recipe: str = 'paper'
    settings: tuple[str, ...] = ()
    start: str | None = None
    steps: tuple[int, int, int] = (1, 1, 1)
    first_steps: tuple[int, int, int] = (1, 1, 1)


def _own_history(**values: float) -> tuple[str, ...]:
    """Return settings of the share of examples behind own history."""
    return tuple(f'--config.dmd.own_history.{name}={value}' for name, value in values.items())


STUDENTS: Mapping[str, Student] = MappingProxyType(
    {
        'student': Student(),
        'regression': Student('regression'),
        'matching': Student('matching'),
        'paper': Student(settings=('--config.dmd.clean_prediction=paper',)),
        # From none to all examples: the ramp starts after a quarter of the preset's 700 steps and lasts a quarter. As
        # examples behind own history have no regression, there is none in the second half of the training.
        'own_history': Student(settings=_own_history(last=1.0, ramp_start=175, ramp_steps=175)),
        # Half of the examples from the first step on, so that the regression stays.
        'own_half': Student(settings=_own_history(first=0.5, last=0.5)),
        'adversarial': Student('adversarial'),
        'consistency': Student('consistency'),
        'after_consistency': Student(start='consistency'),
        'decayed': Student('decayed'),
        'clip_10': Student(settings=tuple(f'--config.dmd.{name}.clip_norm=10.0' for name in ('student', 'fake'))),
        'even': Student('even', steps=(2, 2, 1), first_steps=(2, 2, 1)),
        # Of `train.benchmark --start`.
        'first_frame': Student(
            'first_frame',
            ('--config.dmd.student.decay_steps=2100', '--config.loop.steps=2100'),
            first_steps=(2, 2, 2),
        ),
    }
)
# Of the tier `one_step`: each recipe and the paper's, which comes first.
ONE_STEP = ('student', 'adversarial', 'consistency', 'after_consistency', 'decayed', 'even')
# The same on the teacher of a checkpoint, with each of the paper's terms alone, and clipping that does not bite.
RECIPES = (*ONE_STEP, 'matching', 'regression', 'clip_10')
# Of the tier `collapse`. A new one is the last, so that an existing folder trains it alone.
HISTORIES = ('student', 'own_history', 'regression', 'matching', 'own_half')
