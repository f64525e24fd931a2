"""Tier `recovery`: how soon a pruned denoiser recovers, with stage 1 of the pruning and without it.

    scenes -> latents -> teacher -> choice of blocks -> for each total of steps: { stage 1 -> stage 2, stage 2 }

The video VAE and the text encoders are those of the checkpoint that --start names. The teacher is trained from random
weights, with twelve blocks; nine are kept. Both ways have the same total of steps; the one with stage 1 spends
half of them there. All use AdamW at a constant rate, so that a run of 100 steps is the beginning of one of 200.

Source: Neodragon, arXiv 2511.06055, section on block pruning, which reports that stage 2 fails without stage 1.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.models.context_adapter import ContextAdapter
from train.benchmark.chain import ADAPTER, DENOISER, Step
from train.benchmark.continuation import Continuation
from train.benchmark.evidence import GENERATED, Evidence, Target
from train.benchmark.figures import Curves
from train.benchmark.systems import System
from train.runtime.metrics import read_metrics

# Steps of both stages together, and number of blocks that are removed.
TOTALS = (50, 100, 200, 400)
REMOVED = 3
# Ways to spend the steps: in both stages, or in stage 2 alone.
BOTH, ALONE = 'both', 'alone'
# The full denoiser, and the pruned one before any step.
FULL, UNTRAINED = 'teacher', 'untrained'
COLUMNS = ('shape', 'all', 'mismatch', 'motion')
DRAWN_COLUMNS = {'all': 'all attributes right', 'mismatch': 'shape mismatch'}
# Width of a head of the teacher.
HEAD = 32
VALIDATION = 'eval/validation'


@dataclasses.dataclass(frozen=True)
class Recovery(Continuation):
    """The folders and commands of one seed."""

    @property
    def students(self) -> tuple[str, ...]:
        """No students are distilled."""
        return ()

    @property
    def first_frames(self) -> tuple[str, ...]:
        """A given first frame would hide most of the damage."""
        return (GENERATED,)

    def steps(self) -> list[Step]:
        """Return all commands in order."""
        steps = [*self._data_sets(), *self._teachers(), *self._choice(), *self._runs()]
        return [*steps, self._evaluation(tuple(step.result for step in steps))]

    def systems(self) -> dict[str, System]:
        """Return the full denoiser and every pruned one, by name."""
        sampling = self.tier.steps, self.tier.steps, self.tier.guidance
        folders = {FULL: self.result('teacher') / DENOISER, UNTRAINED: self.folder / UNTRAINED}
        folders |= {run: self.result(run) / DENOISER for run in runs()}
        adapter = self.start / ADAPTER
        return {name: System(self.start, folder, adapter, *sampling) for name, folder in folders.items()}

    def validation(self) -> dict[str, float]:
        """Return the flow's squared error on held-out examples at the end of every run."""
        losses = {}
        for run in runs():
            rows = [row[VALIDATION] for row in read_metrics(self.folder / run) if VALIDATION in row]
            losses[run] = rows[-1] if rows else math.nan
        return losses

    def _teachers(self) -> Iterator[Step]:
        result = self.result('teacher') / DENOISER
        yield self._train('teacher', self.folder / 'teacher', result, [self._data, *self._width()])

    def _width(self) -> list[str]:
        """Return the options of the teacher's width, which is that of the text states of the start."""
        width = checkpoint.load_module(self.start / ADAPTER, ContextAdapter).config.output_dims
        heads, rest = divmod(width, HEAD)
        if rest:
            raise InputError(f'--start {self.start}: its text states are {width} wide; give a multiple of {HEAD}.')
        sizes = {'num_attention_heads': heads, 'attention_head_dim': HEAD, 'caption_projection_dim': width}
        return [f'--config.teacher.sizes.{name}={value}' for name, value in sizes.items()]

    def _choice(self) -> Iterator[Step]:
        full, choice = self.result('teacher') / DENOISER, self.folder / 'choice'
        yield self._importance(full, REMOVED)
        arguments = ['--denoiser', str(full), '--keep', str(choice / 'keep.json')]
        folder = self.folder / UNTRAINED
        yield Step(UNTRAINED, folder / 'config.json', 'train.prune', ['apply', *arguments, '--out', str(folder)])

    def _runs(self) -> Iterator[Step]:
        full = self.result('teacher') / DENOISER
        common = [f'--config.denoiser={full}', f'--config.keep={self.folder / "choice" / "keep.json"}', self._data]
        for total in TOTALS:
            first = total // 2
            begun = f'stage1_{total}'
            yield self._stage(1, begun, first, common)
            start = f'--config.start={self.result(begun) / DENOISER}'
            yield self._stage(2, f'{BOTH}_{total}', total - first, [*common, start])
            yield self._stage(2, f'{ALONE}_{total}', total, common)

    def _stage(self, stage: int, name: str, steps: int, arguments: Sequence[str]) -> Step:
        """Return one training, evaluated at its end."""
        ends = ('steps', 'evaluate_every', 'checkpoint_every')
        given = [*arguments, *(f'--config.loop.{end}={steps}' for end in ends)]
        return self._train('pruning', self.folder / name, self.result(name) / DENOISER, given, name, f'stage{stage}')

    def _evaluation(self, after: tuple[pathlib.Path, ...]) -> Step:
        return super()._evaluation(after)._replace(result=self.evaluated)


def runs() -> list[str]:
    """Return the names of the trainings that are compared."""
    return [f'{way}_{total}' for total in TOTALS for way in (BOTH, ALONE)]


def recovery_targets() -> list[Target]:
    """Return the targets: most is recovered at the end, and stage 1 pays."""
    lost = lambda seen, run: 100 * (seen.mean(FULL, 'all') - seen.mean(run, 'all'))
    gain = lambda seen, total: lost(seen, f'{ALONE}_{total}') - lost(seen, f'{BOTH}_{total}')
    last = TOTALS[-1]
    return [
        Target('points of all attributes lost without training', lambda seen: lost(seen, UNTRAINED)),
        Target(f'points lost after {last} steps of both stages', lambda seen: lost(seen, f'{BOTH}_{last}'), most=2.0),
        *(
            Target(f'stage 2 alone, {total} steps: points lost beyond', lambda seen, n=total: gain(seen, n), least=0.0)
            for total in TOTALS
        ),
    ]


def recovery_table(seen: Sequence[Evidence], estimate: Any) -> list[str]:
    """Return the report's section: a row per denoiser.

    Args:
      estimate: function from a number of the evidence to its mean and error, see `statistics.Estimator`.
    """
    lines = ['## Recovery', '', f'| denoiser | held-out flow error | {" | ".join(COLUMNS)} |']
    lines.append(f'|---|---:{"|---:" * len(COLUMNS)}|')
    for name in (FULL, UNTRAINED, *runs()):
        cells = [estimate(lambda one, c=column, n=name: one.mean(n, c)) for column in COLUMNS]
        flow = sum(one.runs.get(name, math.nan) for one in seen) / len(seen)
        lines.append(f'| {name} | {flow:.4f} | {" | ".join(map(str, cells))} |')
    return [*lines, '']


def recovery_curves(estimate: Any) -> Curves:
    """Return the numbers of both ways over the total of steps.

    Args:
      estimate: as in `recovery_table`.
    """
    of = lambda name, column: estimate(lambda one: one.mean(name, column))
    ways = {'stages 1 and 2': BOTH, 'stage 2 alone': ALONE}
    return Curves(
        x=TOTALS,
        label='steps of both stages together',
        panels={
            title: {way: [of(f'{run}_{total}', column) for total in TOTALS] for way, run in ways.items()}
            for column, title in DRAWN_COLUMNS.items()
        },
        levels={
            title: {'all blocks': of(FULL, column), 'not trained': of(UNTRAINED, column)}
            for column, title in DRAWN_COLUMNS.items()
        },
    )
