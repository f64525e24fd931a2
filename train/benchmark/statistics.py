"""Standard errors of the benchmark's numbers.

All systems and seeds have the same captions, and clips of captions that tell the same are dependent. The error of a
number (or of a difference or ratio of two systems on the same captions) is

    error^2 = (G - 1) / G  sum over captions g of (v_g - mean of v)^2         delete-a-group jackknife
              + sum over shares s of 0 or 1 of (v_s - v)^2                   one wrong caption
              + t^2 deviation over seeds^2 / S                               training differs by seed

with v the number, mean over seeds, and v_g without the clips of caption g, by what it tells; G captions, S seeds. A
share of exactly 0 or 1 is the same without any caption; v_s has the clips of one caption changed in it, in all
seeds. t is the ratio of the 97.5% points of Student's distribution with S - 1 degrees of freedom and of the
normal one, so that two errors always mean 95%. With one seed the last line is missing: such errors do not contain the
variation of training, and a number without clips has none.

Source: the jackknife of groups is that of Efron and Stein, Annals of Statistics 9, 1981.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from train.benchmark.evidence import CLIPS, COMBINATIONS, SECOND, Evidence, captions_of
from train.shapes.attributes import Estimate
from train.shapes.world import Traits, World

# Columns of clips that are 0 or 1.
SHARES = (*Traits._fields, 'all', 'steady', SECOND)
# 97.5% points of Student's distribution with 1, 2, ... degrees of freedom, and of the normal one.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
NORMAL = 1.960


class Estimator:
    """Estimator of numbers from the evidence of all seeds."""

    def __init__(self, seen: Sequence[Evidence], world: World) -> None:
        """Prepare the evidence without each caption, with one wrong caption, and without any clip.

        Args:
          seen: of each seed; all have results of the same systems, on the same captions.
        """
        self._seen = seen
        # The oldest results have no clips.
        self._unknown = any(COMBINATIONS not in system for one in seen for system in one.results.values())
        captions = [] if self._unknown else captions_of(seen[0], world)
        clips = [np.array([one == caption for one in captions]) for caption in sorted(set(captions))]
        several = clips if len(clips) > 1 else []
        self._without = [[evidence.only(~here) for evidence in seen] for here in several]
        # As many clips as captions have on average.
        usual = min(clips, key=lambda here: abs(here.sum() - len(captions) / len(clips)), default=None)
        self._one_wrong = [] if usual is None else list(_one_wrong(seen, usual))
        blank = lambda results: {name: _blank(system) for name, system in results.items()}
        self._blank = [one._replace(results=blank(one.results)) for one in seen]

    def __call__(self, value: Callable[[Evidence], float]) -> Estimate:
        """Return the mean of a number over seeds, and its error; NaN where it is unknown."""
        values = [value(evidence) for evidence in self._seen]
        mean, count = float(np.mean(values)), len(values)
        of_seeds = student_factor(count) * float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
        if self._unknown:
            return Estimate(mean, math.nan)
        if not any(math.isnan(value(one)) for one in self._blank):  # depends on no clips
            return Estimate(mean, of_seeds if count > 1 else math.nan)
        return Estimate(mean, math.hypot(self._of_captions(value), self._of_one_wrong(value, mean), of_seeds))

    def _of_captions(self, value: Callable[[Evidence], float]) -> float:
        left_out = [np.mean([value(evidence) for evidence in seen]) for seen in self._without]
        count = len(left_out)
        return math.sqrt((count - 1) * np.var(left_out)) if count > 1 else math.nan

    def _of_one_wrong(self, value: Callable[[Evidence], float], mean: float) -> float:
        changes = (float(np.mean([value(evidence) for evidence in seen])) - mean for seen in self._one_wrong)
        return math.hypot(*changes)


def student_factor(seeds: int) -> float:
    """Return t, by which the deviation over few seeds is widened."""
    degrees, z = seeds - 1, NORMAL
    # Beyond the table, two terms of the Cornish-Fisher expansion in 1 / degrees are right to 0.1%.
    expanded = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return (STUDENT[degrees - 1] if degrees <= len(STUDENT) else expanded) / z


def _one_wrong(seen: Sequence[Evidence], here: np.ndarray) -> Iterator[list[Evidence]]:
    """Yield for each share of 0 or 1 the evidence of all seeds with some clips changed in it."""
    for system in seen[0].results:
        for column in SHARES:
            found = [evidence.results.get(system, {}).get(CLIPS, {}).get(column, ()) for evidence in seen]
            together = np.concatenate([np.asarray(values, float) for values in found])
            if len(together) and np.ptp(together) == 0:
                changed = np.where(here, 1 - together[0], together[0])
                yield [_changed(evidence, system, column, changed) for evidence in seen]


def _changed(evidence: Evidence, system: str, column: str, values: np.ndarray) -> Evidence:
    """Return the evidence with other values of the clips in one column of a system."""
    before = evidence.results[system]
    after = {**before, column: [float(np.mean(values)), 0.0], CLIPS: {**before[CLIPS], column: values}}
    return evidence._replace(results={**evidence.results, system: after})


def _blank(system: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the results of a system with NaN for everything that was read from clips."""
    clips = system.get(CLIPS, {})
    means = {name: [math.nan, math.nan] for name in clips}
    return {**system, **means, CLIPS: {name: np.full(len(values), math.nan) for name, values in clips.items()}}
