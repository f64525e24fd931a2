"""The commands of `train.benchmark --start CKPT`: students of an existing checkpoint's teacher.

    stills, clips -> teacher of unit 0 -> teacher -> samples -> students -> evaluation

The video VAE, the text encoders and the teacher's context adapter stay those of CKPT. The tier decides whether its
multi-step denoiser is trained further (`Tier.further`) and which students are distilled from it (`Tier.continued`).
With tier cpu, sharper first frames: the teacher is trained on single frames, where all examples are of unit 0, then on
clips, half of whose examples are; the student has two steps per stage in unit 0.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator

from train.benchmark.chain import ADAPTER, DENOISER, LANGUAGE, TEXT_ENCODER, VAE, Chain, Step

# Single frames per clip of the tier: they are cheap, and only unit 0 has to place a shape.
STILLS = 3
# Recipe of the teacher's further training -> the folder with its latents.
_LATENTS = {'stills': 'still_latents', 'continued': 'latents'}


@dataclasses.dataclass(frozen=True)
class Continuation(Chain):
    """The folders and commands of one seed.

    Attributes:
      start: root of the checkpoint to continue from.
    """

    start: pathlib.Path

    @property
    def students(self) -> tuple[str, ...]:
        """The names of the students; the first one is shipped."""
        return self.tier.continued

    @property
    def sampled_teacher(self) -> str:
        """The name of the system that the students learn from."""
        return 'teacher'

    def steps(self) -> list[Step]:
        """Return all commands in order."""
        steps = [*self._data_sets(), *self._teachers(), *self._distillation()]
        return [*steps, self._evaluation(tuple(step.result for step in steps))]

    def _data_sets(self) -> Iterator[Step]:
        """Yield the commands that draw and encode clips of one frame, and of all."""
        if 'stills' in self.tier.further:
            still = dataclasses.replace(self.tier, frames=1)
            yield self._clips('stills', STILLS * self.tier.clips, still.size, seed=2)
            yield self._latents('still_latents', 'stills', self.start, batch=64)
        if 'continued' in self.tier.further:
            yield self._clips('scenes', self.tier.clips, self.tier.size, seed=1)
            yield self._latents('latents', 'scenes', self.start, batch=8)

    def _teachers(self) -> Iterator[Step]:
        """Yield the trainings of the multi-step denoiser, on single frames and on clips."""
        start = self.start / DENOISER
        for name in self.tier.further:
            arguments = [f'--config.data={self.out / _LATENTS[name]}', f'--config.teacher.start={start}']
            arguments += [self._half_at_first] if name == 'continued' else []
            title = self._title(name)
            result = self.result(title) / DENOISER
            yield self._train('teacher', self.folder / title, result, arguments, title, recipe=name)
            start = result

    def _title(self, recipe: str) -> str:
        """Return the name of a training of the teacher; the last one makes the teacher of the students."""
        return 'teacher' if recipe == self.tier.further[-1] else f'teacher_{recipe}'

    def _distillation(self) -> Iterator[Step]:
        parts = {self.distilled_text / name: self.start / name for name in (*LANGUAGE, TEXT_ENCODER, VAE, ADAPTER)}
        trained = self.result('teacher') if self.tier.further else self.start
        parts[self.distilled_text / DENOISER] = trained / DENOISER
        yield self._samples(parts)
        for name in self.students:
            yield self._student(name)

    def _evaluation(self, after: tuple[pathlib.Path, ...]) -> Step:
        """Return the evaluation of all systems, which also writes the checkpoint to ship."""
        step = super()._evaluation(after)
        return step._replace(arguments=[*step.arguments, '--start', str(self.start)])
