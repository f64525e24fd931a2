"""Targets of the benchmark, as numbers computed from the results of all systems.

The teacher's targets are absolute; every distillation is compared with the system that it learns from. Targets on
videos are set twice: for generated and for given first frames.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from neodragon_jax.base.json_file import read_json
from neodragon_jax.checkpoint.folders import PYRAMID_FLOW_VAE as AUTOENCODER
from train.benchmark.chain import VAE, Chain
from train.benchmark.evaluation import GENERATED, GIVEN
from train.runtime.metrics import read_metrics
from train.shapes.world import Traits

# Name of a system and first frame -> attribute -> (mean, standard error); some entries are plain numbers.
Results = Mapping[str, Mapping[str, Any]]


class Evidence(NamedTuple):
    """The results of a seed: evaluated videos, and records of the programs.

    Attributes:
      text_cosine: cosine of the distilled text states with the teacher's, on held-out captions, for training with and
        without the cosine term.
      importance_correlation: rank correlation of the two streams' importances over blocks; NaN if one is constant.
      encoder_kept: whether the small decoder's encoder equals the native one bit for bit.
    """

    results: Results
    text_cosine: Mapping[str, float]
    importance_correlation: float
    encoder_kept: bool

    def mean(self, system: str, attribute: str, first: str = GENERATED) -> float:
        """Return a number of a system that generates."""
        return float(self.results[f'{system}/{first}'][attribute][0])

    def accuracy(self, system: str, first: str = GENERATED) -> float:
        """Return the mean accuracy over all attributes."""
        return float(np.mean([self.mean(system, name, first) for name in Traits._fields]))


@dataclasses.dataclass(frozen=True)
class Target:
    """One number that should lie between two bounds.

    Attributes:
      least, most: None for a number that is reported only.
    """

    name: str
    value: Callable[[Evidence], float]
    least: float | None = None
    most: float | None = None

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


def gather(chain: Chain) -> Evidence:
    """Read the results of a seed."""
    results = read_json(chain.folder / 'evaluation.json', dict[str, Any])
    cosine = {name: 1 - _last_metric(chain, name, 'eval/cosine_distance') for name in ('text', 'text_without_cosine')}
    importance = read_json(chain.folder / 'choice' / 'importance.json', dict[str, Any])
    return Evidence(results, cosine, _number(importance['correlation']['spearman']), _encoder_kept(chain))


def _last_metric(chain: Chain, run: str, name: str) -> float:
    return next((row[name] for row in reversed(read_metrics(chain.folder / run)) if name in row), float('nan'))


def _number(value: float | None) -> float:
    return float('nan') if value is None else value


def _encoder_kept(chain: Chain) -> bool:
    """Return whether every tensor of the encoder is the same in both autoencoders."""
    tensors = []
    for folder in (chain.out / 'autoencoder' / 'result' / AUTOENCODER, chain.out / 'decoder' / 'result' / VAE):
        stored: dict[str, np.ndarray] = {}
        for path in folder.glob('*.safetensors'):
            stored |= safetensors.numpy.load_file(path)
        tensors.append({name: value for name, value in stored.items() if name.startswith(('encoder.', 'quant_conv.'))})
    native, small = tensors
    return bool(native) and native.keys() == small.keys() and all(
        np.array_equal(native[name], small[name]) for name in native
    )  # fmt: skip


# Suffix of the names of targets with a given first frame.
GIVEN_TOO = ', first frame given'

Value = Callable[[Evidence, str], float]


def _of_teacher(attribute: str) -> Value:
    return lambda seen, first: seen.mean('teacher', attribute, first)


def _points_lost(system: str, other: str = 'teacher') -> Value:
    return lambda seen, first: 100 * (seen.accuracy(other, first) - seen.accuracy(system, first))


def _points_of(attribute: str, system: str, other: str) -> Value:
    return lambda seen, first: 100 * (seen.mean(other, attribute, first) - seen.mean(system, attribute, first))


def _mismatch_over(system: str, other: str) -> Value:
    return lambda seen, first: seen.mean(system, 'mismatch', first) / seen.mean(other, 'mismatch', first)


def _motion_error(seen: Evidence, system: str, first: str) -> float:
    return abs(seen.mean(system, 'motion', first) - seen.results['drawn']['motion'][0])


def _of_videos(name: str, value: Value, least: float | None = None, most: float | None = None) -> tuple[Target, ...]:
    """Return a target twice: for generated and for given first frames."""
    return (
        Target(name, lambda seen: value(seen, GENERATED), least, most),
        Target(name + GIVEN_TOO, lambda seen: value(seen, GIVEN), least, most),
    )


TARGETS = (
    *_of_videos('teacher: color right', _of_teacher('color'), least=0.98),
    *_of_videos('teacher: direction right', _of_teacher('direction'), least=0.95),
    *_of_videos('teacher: shape right', _of_teacher('shape'), least=0.85),
    *_of_videos('teacher: motion, 1 as drawn', _of_teacher('motion'), least=0.85, most=1.15),
    *_of_videos('teacher: shape mismatch', _of_teacher('mismatch'), most=0.25),
    *_of_videos('teacher: all attributes right', _of_teacher('all'), least=0.8),
    *_of_videos('text: points of accuracy lost', _points_lost('text'), most=2.0),
    Target('text: cosine of the states', lambda seen: seen.text_cosine['text'], least=0.98),
    Target('text without the cosine term: cosine', lambda seen: seen.text_cosine['text_without_cosine']),
    *_of_videos('text without the cosine term: points lost', _points_lost('text_without_cosine')),
    Target(
        'small decoder: dB below the native one',
        lambda seen: seen.results['native']['psnr_db'] - seen.results['small']['psnr_db'],
        most=1.5,
    ),
    Target(
        'small decoder: times fewer parameters',
        lambda seen: seen.results['native']['decoder_parameters'] / seen.results['small']['decoder_parameters'],
        least=10.0,
    ),
    Target('small decoder: encoder kept bit for bit', lambda seen: float(seen.encoder_kept), least=1.0),
    *_of_videos('pruning, stages 1 and 2: points lost', _points_lost('pruned'), most=2.0),
    *_of_videos('pruning, stages 1 and 2: points of shape lost', _points_of('shape', 'pruned', 'teacher'), most=5.0),
    *_of_videos('pruning, stage 2 alone: points lost beyond', _points_lost('pruned_stage2_alone', 'pruned'), least=1.0),
    Target("pruning: rank correlation of the streams' importances", lambda seen: seen.importance_correlation),
    *_of_videos('student: mismatch over its teacher at 1-1-1', _mismatch_over('student', 'teacher_1'), most=0.6),
    # The teacher that the student learns from reads the same distilled text encoder, also at 1-1-1.
    *_of_videos('student: mismatch over its teacher', _mismatch_over('student', 'text'), most=1.1),
    *_of_videos('student: mismatch over the teacher with the big text encoder', _mismatch_over('student', 'teacher')),
    *_of_videos('student: points of shape lost to its teacher', _points_of('shape', 'student', 'text'), most=5.0),
    *_of_videos('student: points of all attributes lost', _points_of('all', 'student', 'text'), most=5.0),
    *_of_videos('student: motion, 1 as drawn', lambda seen, first: seen.mean('student', 'motion', first), 0.9, 1.1),
)
# Only for tiers that train the students in the comparison.
CONTROLS: Mapping[str, tuple[Target, ...]] = {
    'regression': _of_videos(
        'regression alone: error of motion beyond the student',
        lambda seen, first: _motion_error(seen, 'regression', first) - _motion_error(seen, 'student', first),
        least=0.0,
    ),
    'paper': _of_videos("paper's clean prediction: mismatch over the exact one", _mismatch_over('paper', 'student')),
    'own_history': _of_videos('own history: mismatch over the student', _mismatch_over('own_history', 'student')),
}


def targets(chain: Chain) -> list[Target]:
    """Return the targets of a tier."""
    controls = (CONTROLS[name] for name in chain.tier.students if name in CONTROLS)
    return [*TARGETS, *itertools.chain.from_iterable(controls)]
