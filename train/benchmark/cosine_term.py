"""Tier `cosine`: the text-encoder distillation with the cosine term and without it, for a teacher with outliers.

    language -> teacher with outlier channels; prompts -> text, with and without the cosine term -> numbers

Some channels of the states of large text encoders are many times larger than the others. Here, `OUTLIERS` channels of
the teacher's states are thirty times larger. DT5 is frozen, and the context adapter is trained in bfloat16 with AdamW,
as in the paper, which attributes the stability of the training to the cosine term.

Source: Neodragon, arXiv 2511.06055, section on text-encoder distillation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from neodragon_jax.base.errors import InputError
from train.benchmark.chain import ADAPTER, TEXT_ENCODER, WITH_EMBEDDER, Chain, Step
from train.benchmark.evidence import Evidence, Target
from train.benchmark.figures import Curves
from train.runtime.metrics import read_metrics
from train.shapes.text_encoders import TEACHER_ENCODER

OUTLIERS = 2
# Folder of the T5 encoder that train.random_teacher writes.
OUTLIER_ENCODER = 'text_encoder'
# Run -> weight of the cosine term.
RUNS: Mapping[str, float] = MappingProxyType({'with_cosine': 0.1, 'without_cosine': 0.0})
# A spike is a gradient whose norm is this many times the median of the WINDOW steps before it.
SPIKE, WINDOW = 3.0, 50
# Metric that the evaluation of a run logs, with others.
EVALUATED = 'eval/cosine_distance'
# Largest norm over the median before it, in each WINDOW steps after the first.
LARGEST_BY_WINDOW = 'largest_by_window'
# Number of a run -> title.
TITLES: Mapping[str, str] = MappingProxyType(
    {
        'spikes': f'steps with {SPIKE:g} times the median gradient norm, of 1,000',
        'largest': 'largest gradient norm over the median before it',
        'mean': 'cosine distance, mean of the held-out tokens',
        'tail': 'cosine distance, 99th percentile',
        'top1': 'retrieval: first hit right',
    }
)


@dataclasses.dataclass(frozen=True)
class CosineTerm(Chain):
    """The folders and commands of one seed."""

    @property
    def students(self) -> tuple[str, ...]:
        """No students are distilled."""
        return ()

    def steps(self) -> list[Step]:
        """Return all commands in order."""
        steps = [self._language(), *self._teacher_and_prompts(), *self._trainings()]
        return [*steps, self._evaluation(tuple(step.result for step in steps))._replace(result=self.evaluated)]

    def _teacher_and_prompts(self) -> Iterator[Step]:
        language, teacher = self.out / 'language', self.out / 'outliers'
        encoder = ['--encoder', str(language / TEACHER_ENCODER), '--outliers', str(OUTLIERS)]
        result = teacher / WITH_EMBEDDER / 'config.json'
        yield Step('outliers', result, 'train.random_teacher', [*encoder, '--out', str(teacher)])
        yield self._prompts(language)

    def _trainings(self) -> Iterator[Step]:
        teacher = self.out / 'outliers'
        common = [
            f'--config.data={self.out / "prompts"}',
            f'--config.teacher={teacher / OUTLIER_ENCODER}',
            f'--config.embedder={teacher / WITH_EMBEDDER}',
            f'--config.encoder={self.out / "language" / TEXT_ENCODER}',
        ]
        for name, weight in RUNS.items():
            arguments = [*common, f'--config.text.cosine_weight={weight}']
            yield self._train('text', self.folder / name, self.result(name) / ADAPTER, arguments, name)

    def numbers(self) -> dict[str, dict[str, Any]]:
        """Return the numbers of both runs, see `numbers_of`.

        Raises:
          InputError: a run is not trained.
        """
        rows = {name: read_metrics(self.folder / name) for name in RUNS}
        for name, logged in rows.items():
            if not any(EVALUATED in row for row in logged):
                raise InputError(f'{self.folder / name}: is not trained. Run the same command without --only.')
        return {name: numbers_of(logged) for name, logged in rows.items()}


def numbers_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the numbers of a run from its logged metrics: those in TITLES, and the largest norm by window."""
    over = over_median(np.array([row['grad_norm'] for row in rows if 'grad_norm' in row]))
    last = next(row for row in reversed(rows) if EVALUATED in row)
    whole = over[: len(over) // WINDOW * WINDOW].reshape(-1, WINDOW)
    return {
        LARGEST_BY_WINDOW: np.max(whole, axis=1).tolist(),
        'spikes': 1000 * float(np.mean(over > SPIKE)),
        'largest': float(np.max(over)),
        'mean': last[EVALUATED],
        'tail': last[f'{EVALUATED}/p99'],
        'top1': last['eval/retrieval/top1'],
    }


def over_median(norms: Any) -> Any:
    """Return each norm over the median of the WINDOW norms before it; the first WINDOW are left out."""
    windows = np.lib.stride_tricks.sliding_window_view(norms, WINDOW)[:-1]
    return norms[WINDOW:] / np.median(windows, axis=1)


def cosine_targets() -> list[Target]:
    """Return the targets: what the cosine term should improve."""
    ratio = lambda name: lambda seen: seen.runs['with_cosine'][name] / seen.runs['without_cosine'][name]
    return [
        Target('largest gradient spike, with over without the cosine term', ratio('largest'), most=1.0),
        Target('tail of the cosine distance, with over without', ratio('tail'), most=1.0),
        Target('mean cosine distance, with over without', ratio('mean'), most=1.0),
    ]


def cosine_table(seen: Sequence[Evidence], estimate: Any) -> list[str]:
    """Return the report's section: a column per run.

    Args:
      estimate: function from a number of the evidence to its mean and error, see `statistics.Estimator`.
    """
    lines = ['## The cosine term', '', f'| number | {" | ".join(RUNS)} |', f'|---{"|---:" * len(RUNS)}|']
    for name, title in TITLES.items():
        cells = [estimate(lambda one, r=run, n=name: one.runs[r][n]) for run in RUNS]
        lines.append(f'| {title} | {" | ".join(map(str, cells))} |')
    return [*lines, '']


def cosine_curves(seen: Sequence[Evidence], estimate: Any) -> Curves:
    """Return the largest gradient norm by window of both runs, over the median before it.

    Args:
      estimate: as in `cosine_table`.
    """
    windows = range(min(len(one.runs[run][LARGEST_BY_WINDOW]) for one in seen for run in RUNS))
    series = {
        f'weight {weight:g}': [estimate(lambda one, r=run, n=n: one.runs[r][LARGEST_BY_WINDOW][n]) for n in windows]
        for run, weight in RUNS.items()
    }
    title = f'largest gradient norm of {WINDOW} steps, over the median before'
    return Curves([WINDOW * (number + 2) for number in windows], 'step', {title: series})
