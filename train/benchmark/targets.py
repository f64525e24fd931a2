"""Targets of the benchmark, as numbers computed from the results of all systems.

The teacher's targets are absolute; every distillation is compared with the system that it learns from. Targets on
videos are set twice: for generated and for given first frames.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import read_json
from train.benchmark import outdated
from train.benchmark.chain import AUTOENCODER, VAE, Chain
from train.benchmark.continuation import Continuation
from train.benchmark.cosine_term import CosineTerm, cosine_targets
from train.benchmark.evidence import GENERATED, GIVEN, Evidence, Target, Value, captions_of
from train.benchmark.motion import motion_targets
from train.benchmark.recovery import Recovery, recovery_targets
from train.benchmark.students import ONE_STEP
from train.benchmark.systems import BEFORE
from train.runtime.metrics import read_metrics
from train.shapes.world import WORLDS, World


def gather(chain: Chain) -> Evidence:
    """Read the results of a seed.

    Raises:
      InputError: it is not evaluated, or a file is damaged.
    """
    if isinstance(chain, CosineTerm):
        return Evidence({}, {}, math.nan, encoder_kept=True, runs=chain.numbers())
    if not chain.evaluation_file.is_file():
        raise InputError(
            f'{chain.evaluation_file}: there is none; seed {chain.seed} is not evaluated. Run the same command without '
            '--only.'
        )
    results = outdated.read_results(chain)
    if isinstance(chain, Recovery):
        return Evidence(results, {}, math.nan, encoder_kept=True, runs=chain.validation())
    if isinstance(chain, Continuation):
        return Evidence(results, {}, math.nan, encoder_kept=True)
    texts = ('text', 'text_without_cosine') if chain.tier.ablations else ('text',)
    cosine = {name: 1 - _last_metric(chain, name, 'eval/cosine_distance') for name in texts}
    correlation = None
    if chain.tier.ablations:
        importance = read_json(chain.folder / 'choice' / 'importance.json', dict[str, Any])
        correlation = importance['correlation']['spearman']
    return Evidence(results, cosine, _number(correlation), _encoder_kept(chain))


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
    Target(
        'small decoder: dB below the native one',
        lambda seen: seen.number('native', 'psnr_db') - seen.number('small', 'psnr_db'),
        most=1.5,
    ),
    Target(
        'small decoder: times fewer parameters',
        lambda seen: seen.number('native', 'decoder_parameters') / seen.number('small', 'decoder_parameters'),
        least=10.0,
        exact=True,
    ),
    Target('small decoder: encoder kept bit for bit', lambda seen: float(seen.encoder_kept), least=1.0, exact=True),
)


def _student_targets(name: str) -> tuple[Target, ...]:
    """Return the targets of the student that a whole chain ships.

    Args:
      name: of the student. Its teacher reads the same distilled text encoder, also at 1-1-1.
    """
    return (
        *_of_videos('student: mismatch over its teacher at 1-1-1', _mismatch_over(name, 'teacher_1'), most=0.6),
        *_of_videos('student: mismatch over its teacher', _mismatch_over(name, 'text'), most=1.1),
        *_of_videos('student: mismatch over the teacher with the big text encoder', _mismatch_over(name, 'teacher')),
        *_of_videos('student: points of shape lost to its teacher', _points_of('shape', name, 'text'), most=5.0),
        *_of_videos('student: points of all attributes lost', _points_of('all', name, 'text'), most=5.0),
        *_of_videos('student: motion, 1 as drawn', lambda seen, first: seen.mean(name, 'motion', first), 0.9, 1.1),
    )


# Only for tiers with ablations.
ABLATIONS = (
    Target('text without the cosine term: cosine', lambda seen: seen.text_cosine['text_without_cosine']),
    *_of_videos('text without the cosine term: points lost', _points_lost('text_without_cosine')),
    *_of_videos('pruning, stages 1 and 2: points lost', _points_lost('pruned'), most=2.0),
    *_of_videos('pruning, stages 1 and 2: points of shape lost', _points_of('shape', 'pruned', 'teacher'), most=5.0),
    *_of_videos('pruning, stage 2 alone: points lost beyond', _points_lost('pruned_stage2_alone', 'pruned'), least=1.0),
    Target("pruning: rank correlation of the streams' importances", lambda seen: seen.importance_correlation),
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


def recipe_targets(recipes: Sequence[str], teacher: str, world: World) -> tuple[Target, ...]:
    """Return the targets of the best recipe: the one that loses the least shape to its teacher.

    The best of many is better than it is on the captions that it was chosen on. So it is chosen on every second caption
    and judged on the others, and the reverse; the value is the mean of both. A caption's half is that of its place
    among all held-out captions: its error is found by leaving captions out, which must not move the others.
    """
    held_out = sorted({world.captioned(traits) for traits in world.combinations('held_out')})
    first_half = set(held_out[::2])

    def of_best(value: Callable[[str], Value]) -> Value:
        def judged(seen: Evidence, first: str) -> float:
            half = np.array([caption in first_half for caption in captions_of(seen, world)], bool)
            if half.all() or not half.any():
                return math.nan
            found = []
            for chosen, rest in ((half, ~half), (~half, half)):
                judges = seen.only(chosen)
                best = max(recipes, key=lambda name: judges.mean(name, 'shape', first))
                found.append(value(best)(seen.only(rest), first))
            return float(np.mean(found))

        return judged

    return (
        *_of_videos(
            'best recipe: points of shape lost to its teacher',
            of_best(lambda name: _points_of('shape', name, teacher)),
            most=3.0,
        ),
        *_of_videos(
            'best recipe: mismatch over its teacher', of_best(lambda name: _mismatch_over(name, teacher)), most=1.0
        ),
    )


def _right(attribute: str, least: float) -> tuple[Target, ...]:
    """Return the target of an attribute of the shipped student, and the gain over the checkpoint before."""
    name = 'all attributes' if attribute == 'all' else attribute
    return (
        *_of_videos(f'student: {name} right', lambda seen, first: seen.mean(SHIPPED, attribute, first), least=least),
        *_of_videos(f'student: points of {name} gained', _points_of(attribute, BEFORE, SHIPPED), least=0.0),
    )


# Of a continuation: 47 and 45 of 48 captions.
SHIPPED = 'first_frame'
CONTINUED = (
    *_of_videos('teacher: shape right', _of_teacher('shape'), least=0.97),
    *itertools.chain.from_iterable(_right(name, 47 / 48) for name in ('color', 'direction', 'background')),
    *itertools.chain.from_iterable(_right(name, 45 / 48) for name in ('shape', 'all')),
    *_of_videos('student: shape steady', lambda seen, first: seen.mean(SHIPPED, 'steady', first), least=0.9),
    *_of_videos('student: motion, 1 as drawn', lambda seen, first: seen.mean(SHIPPED, 'motion', first), 0.9, 1.1),
)


def targets(chain: Chain) -> list[Target]:
    """Return the targets of a tier, or of a continuation."""
    if isinstance(chain, CosineTerm):
        return cosine_targets()
    if isinstance(chain, Recovery):
        return recovery_targets()
    tier, world, teacher = chain.tier, WORLDS[chain.tier.world], chain.sampled_teacher
    if world.omitted:
        return motion_targets(world, tier.units, chain.students, teacher)
    recipes = recipe_targets(chain.students, teacher, world) if set(ONE_STEP) <= set(chain.students) else ()
    if isinstance(chain, Continuation):
        return [*(CONTINUED if SHIPPED in chain.students else ()), *recipes]
    found = [*TARGETS, *_student_targets(chain.students[0]), *(ABLATIONS if tier.ablations else ()), *recipes]
    controls = (CONTROLS[name] for name in tier.students if name in CONTROLS)
    return [*found, *itertools.chain.from_iterable(controls)]
