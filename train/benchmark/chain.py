"""The commands of `train.benchmark`, for the chains that put them in order.

Every step is one of the project's programs with its preset `shapes`, run as a user would run it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Self

from neodragon_jax.checkpoint import folders
from neodragon_jax.generation import defaults as generation
from train.benchmark.evidence import GENERATED, GIVEN
from train.benchmark.students import STUDENTS
from train.benchmark.tiers import TIERS, Tier
from train.shapes.text_encoders import TEACHER_ENCODER

# Folders of the components, by their role in the benchmark.
AUTOENCODER, VAE = folders.PYRAMID_FLOW_VAE, folders.VIDEO_VAE
TEXT_ENCODER, ADAPTER = folders.T5, folders.TEACHER_ADAPTER
DENOISER, WITH_EMBEDDER = folders.TEACHER, folders.PYRAMID_FLOW
# Tokenizers and untrained text encoders.
LANGUAGE = (*folders.TOKENIZERS, folders.CLIP_L, folders.CLIP_G)


class Step(NamedTuple):
    """One command of the chain.

    Attributes:
      name: name of the step.
      result: a file that exists once the step is done.
      module: module of the program.
      arguments: arguments of the program.
      parts: component folders to copy into a checkpoint before the program runs: target -> source.
      after: results of other steps to wait for, in addition to those named in the arguments.
    """

    name: str
    result: pathlib.Path
    module: str
    arguments: list[str]
    parts: Mapping[pathlib.Path, pathlib.Path] = MappingProxyType({})
    after: tuple[pathlib.Path, ...] = ()


@dataclasses.dataclass(frozen=True)
class Chain:
    """The folders and commands of one seed; a subclass lists the commands of its tier.

    Attributes:
      out: folder of the benchmark, with the autoencoder, scenes and text encoders that all seeds share.
    """

    tier: Tier
    out: pathlib.Path
    seed: int

    @property
    def folder(self) -> pathlib.Path:
        """The folder of the seed."""
        return self.out / f'seed-{self.seed}'

    @property
    def distilled_text(self) -> pathlib.Path:
        """The checkpoint with the distilled text encoder."""
        return self.folder / 'checkpoint'

    @property
    def students(self) -> tuple[str, ...]:
        """The names of the students; the first one is shipped."""
        return self.tier.students

    def with_students(self, names: Sequence[str]) -> Self:
        """Return the chain with other students."""
        return dataclasses.replace(
            self, tier=dataclasses.replace(self.tier, students=tuple(names), continued=tuple(names))
        )

    @property
    def sampled_teacher(self) -> str:
        """The name of the system that the students learn from: the teacher with the distilled text encoder."""
        return 'text'

    @property
    def first_frames(self) -> tuple[str, ...]:
        """The kinds of first frames with which systems are evaluated."""
        return GENERATED, GIVEN

    def steps(self) -> list[Step]:
        """Return all commands in order; the evaluation is the last one."""
        raise NotImplementedError

    def result(self, name: str) -> pathlib.Path:
        """The result folder of a program."""
        return self.folder / name / 'result'

    def _language(self) -> Step:
        """Return the writing of tokenizers and untrained text encoders."""
        language = self.out / 'language'
        result = language / TEACHER_ENCODER / 'config.json'
        return Step('language', result, 'train.shapes.language', ['--out', str(language)])

    def _clips(self, name: str, count: int, size: Sequence[str], seed: int) -> Step:
        """Return the drawing of clips."""
        out = self.out / name
        options = ['--world', self.tier.world, '--count', str(count), *size, '--paraphrase', '--seed', str(seed)]
        return Step(name, out / 'dataset_info.json', 'train.moving_shapes', ['--out', str(out), *options])

    def _latents(self, name: str, clips: str, checkpoint: pathlib.Path, batch: int, text: Sequence[str] = ()) -> Step:
        """Return the encoding of clips and captions by a checkpoint; `text` has the options of the captions."""
        out = self.out / name
        arguments = ['--checkpoint', str(checkpoint), '--clips', str(self.out / clips), '--out', str(out), *text]
        arguments += ['--negative-prompt', '', '--batch', str(batch), '--dtype', 'float32', '--store-dtype', 'float32']
        return Step(name, out / 'dataset_info.json', 'train.latents', arguments)

    def _prompts(self, checkpoint: pathlib.Path) -> Step:
        """Return the tokenization of the trained captions by a checkpoint."""
        prompts = self.out / 'prompts'
        arguments = ['--checkpoint', str(checkpoint), '--file', str(self.out / 'prompts.txt'), '--out', str(prompts)]
        return Step('prompts', prompts / 'dataset_info.json', 'train.prompts', arguments)

    def _importance(self, full: pathlib.Path, removed: int) -> Step:
        """Return the choice of the blocks to remove from a denoiser."""
        choice, count = self.folder / 'choice', str(min(32, self.tier.captions))
        arguments = ['--denoiser', str(full), '--data', str(self.out / 'latents'), '--out', str(choice)]
        arguments += ['--remove', str(removed), '--prompts', count, '--samples', '1', '--check-prompts', count]
        arguments += ['--batch', '16', *self._sampling, '--dtype', 'float32']
        return Step('importance', choice / 'keep.json', 'train.prune', ['select', *arguments])

    def _samples(self, parts: Mapping[pathlib.Path, pathlib.Path]) -> Step:
        """Return the sampling of the teacher's videos of the trained captions."""
        samples = self.folder / 'teacher_samples'
        arguments = ['--checkpoint', str(self.distilled_text), '--prompts-file', str(self.out / 'prompts.txt')]
        arguments += ['--out', str(samples), '--count', str(self.tier.samples), *self.tier.size, *self._sampling]
        arguments += ['--prompt-modifier', '', '--negative-prompt', '', '--seed', str(self.seed), '--batch', '32']
        arguments += ['--first-frame', 'generated', '--dtype', 'float32', '--store-dtype', 'float32']
        return Step('samples', samples / 'dataset_info.json', 'train.teacher_samples', arguments, parts)

    def _student(self, name: str) -> Step:
        """Return the distillation of a student."""
        student = STUDENTS[name]
        arguments = [f'--config.data={self.folder / "teacher_samples"}', f'--config.checkpoint={self.distilled_text}']
        arguments += [f'--config.dmd.{key}={self.tier.guidance}' for key in ('guidance', 'first_guidance')]
        arguments += [f'--config.dmd.{key}={self.tier.steps}' for key in ('teacher_steps', 'teacher_first_steps')]
        arguments += student.settings
        if student.start is not None:
            arguments.append(f'--config.dmd.start={self.result(student.start) / folders.STUDENT}')
        workdir, result = self.folder / name, self.result(name) / folders.STUDENT
        return self._train('dmd', workdir, result, arguments, name, recipe=student.recipe)

    def _evaluation(self, after: tuple[pathlib.Path, ...]) -> Step:
        """Return the evaluation of all systems, which also writes the checkpoint to ship."""
        name = next(name for name, tier in TIERS.items() if tier is self.tier)
        arguments = ['--fast'] if name == 'fast' else ['--tier', name]
        arguments += ['--out', str(self.out), '--seeds', str(self.seed), '--only', 'evaluate']
        return Step('evaluation', self.shipped / generation.FILE, 'train.benchmark', arguments, after=after)

    @property
    def shipped(self) -> pathlib.Path:
        """The checkpoint to ship."""
        return self.folder / 'moving_shapes'

    @property
    def evaluation_file(self) -> pathlib.Path:
        """The results of the evaluation."""
        return self.folder / 'evaluation.json'

    @property
    def evaluated(self) -> pathlib.Path:
        """A file that marks the evaluation as done, of a tier without students."""
        return self.folder / 'evaluated.txt'

    @property
    def _data(self) -> str:
        return f'--config.data={self.out / "latents"}'

    @property
    def _half_at_first(self) -> str:
        """The option by which half of a training's examples are of unit 0."""
        return f'--config.teacher.unit_weights={self.tier.unit_weights}'

    @property
    def _sampling(self) -> list[str]:
        steps, guidance = [str(n) for n in self.tier.steps], str(self.tier.guidance)
        return ['--steps', *steps, '--first-steps', *steps, '--guidance', guidance, '--first-guidance', guidance]

    def _train(
        self,
        program: str,
        workdir: pathlib.Path,
        result: pathlib.Path,
        arguments: list[str],
        name: str | None = None,
        preset: str = '',
        seed: int | None = None,
        recipe: str = '',
    ) -> Step:
        """Return a training program with its preset `shapes` and the tier's changes."""
        config = f'configs/{program}.py:{"-".join(filter(None, (preset, "shapes", recipe)))}'
        key = 'students' if program == 'dmd' else recipe or program
        flags = [
            f'--config={config}',
            f'--config.workdir={workdir}',
            f'--config.seed={self.seed if seed is None else seed}',
        ]
        flags += arguments
        flags += self.tier.settings.get(key, ())
        steps = self.tier.training.get(preset or key)
        if steps is not None:
            flags.append(f'--config.loop.steps={steps}')
        return Step(name or program, result / 'config.json', f'train.{program}', flags)
