"""The results of a seed, and targets as numbers computed from them.

Legend: N clips.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from neodragon_jax.base.errors import InputError
from train.shapes.world import Traits, World

# First frames of the videos: from nothing, or that of the drawn scene.
GENERATED, GIVEN = 'generated', 'given'
# Results of the drawn clips, and keys of a system's results: attribute -> value of each clip, and the combination of
# each clip.
DRAWN, CLIPS, COMBINATIONS = 'drawn', 'clips', 'combinations'
# Column of clips: whether a second reader sees the caption's shape, see `train.shapes.fill`; older results lack it.
SECOND = 'shape, second reader'
# Keys of a system's results: identity of its weights, and of how they were sampled; older results lack them.
WEIGHTS, SAMPLING = 'weights', 'sampling'

# Name of a system and first frame -> attribute -> (mean, standard error); some entries are plain numbers.
Results = Mapping[str, Mapping[str, Any]]


class Evaluated(dict[str, Mapping[str, Any]]):
    """The results that all seeds have; a report that needs another one ends."""

    def __missing__(self, name: str) -> Mapping[str, Any]:
        """Raise InputError, which names the result and the remedy."""
        raise InputError(
            f'{name}: the report needs its results of every seed, as it is there now. Run the same command without '
            '--only, which trains and evaluates what is missing.'
        )


class Evidence(NamedTuple):
    """The results of a seed: evaluated videos, and records of the programs.

    Attributes:
      text_cosine: cosine of the distilled text states with the teacher's, on held-out captions, for training with and
        without the cosine term.
      importance_correlation: rank correlation of the two streams' importances over blocks; NaN if one is constant.
      encoder_kept: whether the small decoder's encoder equals the native one bit for bit.
      runs: numbers of the trainings that tiers `recovery` and `cosine` compare.
    """

    results: Results
    text_cosine: Mapping[str, float]
    importance_correlation: float
    encoder_kept: bool
    runs: Mapping[str, Any] = MappingProxyType({})

    def mean(self, system: str, attribute: str, first: str = GENERATED) -> float:
        """Return a number of a system that generates."""
        return float(self.results[f'{system}/{first}'][attribute][0])

    def number(self, system: str, name: str) -> float:
        """Return a number of a system that does not generate; older versions stored one without an error."""
        return float(np.ravel(self.results[system][name])[0])

    def only(self, kept: Bool[np.ndarray, ' N']) -> Evidence:
        """Return the evidence of some clips."""

        def reduced(system: Mapping[str, Any]) -> Mapping[str, Any]:
            clips = {name: np.array(values)[kept] for name, values in system.get(CLIPS, {}).items()}
            means = {name: [float(np.mean(values)), 0.0] for name, values in clips.items()}
            return {**system, **means, CLIPS: clips, COMBINATIONS: np.array(system.get(COMBINATIONS, ()))[kept]}

        return self._replace(results=Evaluated({name: reduced(system) for name, system in self.results.items()}))

    def accuracy(self, system: str, first: str = GENERATED) -> float:
        """Return the mean accuracy over all attributes."""
        return float(np.mean([self.mean(system, name, first) for name in Traits._fields]))


@dataclasses.dataclass(frozen=True)
class Target:
    """One number that should lie between two bounds.

    Attributes:
      least, most: None for a number that is reported only.
      exact: whether the number has no error.
    """

    name: str
    value: Callable[[Evidence], float]
    least: float | None = None
    most: float | None = None
    exact: bool = False

    @property
    def bounds(self) -> str:
        """The bounds as text."""
        if self.least is not None and self.most is not None:
            return f'{self.least:g} to {self.most:g}'
        if self.least is not None:
            return f'at least {self.least:g}'
        return 'reported' if self.most is None else f'at most {self.most:g}'

    def reached(self, value: float) -> bool | None:
        """Return whether a value meets the target; None if there are no bounds."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


def captions_of(evidence: Evidence, world: World) -> list[Traits]:
    """Return what the caption of each clip tells; () without clips, or in the oldest results."""
    combinations = world.combinations('all')
    found: Any = evidence.results.get(DRAWN, {}).get(COMBINATIONS, ())
    return [world.captioned(combinations[number]) for number in found]


# A number of the videos with a first frame of that kind.
Value = Callable[[Evidence, str], float]
