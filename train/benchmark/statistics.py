"""Standard errors of the benchmark's numbers.

Captions are drawn from few combinations of attributes, and all seeds use the same captions, so clips are dependent.
The error of a number (or of a difference or ratio of two systems on the same captions) is

    error^2 = (G - 1) / G  sum over combinations g of (v_g - mean of v)^2     delete-a-group jackknife
              + deviation over seeds^2 / S                                     training differs by seed

with v_g the number without the clips of combination g, mean over seeds; G combinations, S seeds.

Source: the jackknife of groups is that of Efron and Stein, Annals of Statistics 9, 1981.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from train.benchmark.evidence import CLIPS, COMBINATIONS, DRAWN, Evidence
from train.shapes.attributes import Estimate


class Estimator:
    """Estimator of numbers from the evidence of all seeds."""

    def __init__(self, seen: Sequence[Evidence]) -> None:
        self._seen = seen
        self._clips = DRAWN in seen[0].results
        groups = sorted(set(seen[0].results[DRAWN].get(COMBINATIONS, ()))) if self._clips else []
        self._without = [[_without(evidence, group) for evidence in seen] for group in groups]

    def __call__(self, value: Callable[[Evidence], float]) -> Estimate:
        """Return the mean of a number over seeds, and its error.

        The error is NaN where results of clips were not recorded one by one. A number of trainings, without clips, has
        the error of the seeds alone.
        """
        values = [value(evidence) for evidence in self._seen]
        of_seeds = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        left_out = [np.mean([value(evidence) for evidence in seen]) for seen in self._without]
        count = len(left_out)
        of_groups = math.sqrt((count - 1) * np.var(left_out)) if count > 1 else math.nan
        if not self._clips and len(values) > 1:
            of_groups = 0.0
        return Estimate(float(np.mean(values)), math.hypot(of_groups, of_seeds))


def _without(evidence: Evidence, combination: int) -> Evidence:
    """Return the evidence without the clips of a combination."""
    kept = np.array(evidence.results[DRAWN][COMBINATIONS]) != combination

    def reduced(system: Mapping[str, Any]) -> Mapping[str, Any]:
        clips = {name: np.array(values)[kept] for name, values in system.get(CLIPS, {}).items()}
        means = {name: [float(np.mean(values)), 0.0] for name, values in clips.items()}
        return {**system, **means, CLIPS: clips, COMBINATIONS: np.array(system.get(COMBINATIONS, ()))[kept]}

    return evidence._replace(results={name: reduced(system) for name, system in evidence.results.items()})
