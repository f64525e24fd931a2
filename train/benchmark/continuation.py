"""The commands of `train.benchmark --start CKPT`: sharper first frames for an existing checkpoint.

    stills, clips -> teacher of unit 0 -> teacher -> samples -> student -> evaluation

The video VAE, the text encoders and the teacher's context adapter stay those of CKPT. Its multi-step denoiser is
trained further: first on single frames, where all examples are of unit 0, then on clips, half of whose examples are. A
student with two steps per stage in unit 0 is distilled from it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator

from train.benchmark.chain import ADAPTER, DENOISER, LANGUAGE, TEXT_ENCODER, VAE, Chain, Step

# Single frames per clip of the tier: they are cheap, and only unit 0 has to place a shape.
STILLS = 3


@dataclasses.dataclass(frozen=True)
class Continuation(Chain):
    """The folders and commands of one seed.

    Attributes:
      start: root of the checkpoint to continue from.
    """

    start: pathlib.Path

    @property
    def students(self) -> tuple[str, ...]:
        """The names of the students."""
        return ('first_frame',)

    def steps(self) -> list[Step]:
        """Return all commands in order."""
        steps = [*self._data_sets(), *self._teachers(), *self._distillation()]
        return [*steps, self._evaluation(tuple(step.result for step in steps))]

    def _data_sets(self) -> Iterator[Step]:
        """Yield the commands that draw and encode clips of one frame, and of all."""
        still = dataclasses.replace(self.tier, frames=1)
        yield self._clips('stills', STILLS * self.tier.clips, still.size, seed=2)
        yield self._latents('still_latents', 'stills', self.start, batch=64)
        yield self._clips('scenes', self.tier.clips, self.tier.size, seed=1)
        yield self._latents('latents', 'scenes', self.start, batch=8)

    def _teachers(self) -> Iterator[Step]:
        """Yield the trainings of the multi-step denoiser, on single frames and on clips."""
        start = self.start / DENOISER
        for name, data in (('stills', 'still_latents'), ('continued', 'latents')):
            arguments = [f'--config.data={self.out / data}', f'--config.teacher.start={start}']
            title = 'teacher' if name == 'continued' else f'teacher_{name}'
            result = self.result(title) / DENOISER
            yield self._train('teacher', self.folder / title, result, arguments, title, recipe=name)
            start = result

    def _distillation(self) -> Iterator[Step]:
        parts = {self.distilled_text / name: self.start / name for name in (*LANGUAGE, TEXT_ENCODER, VAE, ADAPTER)}
        parts[self.distilled_text / DENOISER] = self.result('teacher') / DENOISER
        yield self._samples(parts)
        (name,) = self.students
        yield self._student(name)

    def _evaluation(self, after: tuple[pathlib.Path, ...]) -> Step:
        """Return the evaluation of all systems, which also writes the checkpoint to ship."""
        step = super()._evaluation(after)
        return step._replace(arguments=[*step.arguments, '--start', str(self.start)])
