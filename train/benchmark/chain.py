"""The commands of `train.benchmark` in their order.

    autoencoder -> { small decoder, latents -> teacher -> { pruning, text } } -> samples -> students -> evaluation

Every step is one of the project's programs with its preset `shapes`, run as a user would run it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from neodragon_jax.checkpoint.folders import CLIP_G, CLIP_L, STUDENT, TOKENIZERS
from neodragon_jax.checkpoint.folders import PYRAMID_FLOW_VAE as AUTOENCODER
from neodragon_jax.checkpoint.folders import T5 as TEXT_ENCODER
from neodragon_jax.checkpoint.folders import TEACHER as DENOISER
from neodragon_jax.checkpoint.folders import TEACHER_ADAPTER as ADAPTER
from neodragon_jax.checkpoint.folders import VIDEO_VAE as VAE
from neodragon_jax.generation import defaults as generation
from train.benchmark.students import STUDENTS
from train.benchmark.tiers import TIERS, Tier
from train.shapes.text_encoders import TEACHER_ENCODER
from train.teacher.program import PYRAMID_FLOW as WITH_EMBEDDER

# Tokenizers and untrained text encoders.
LANGUAGE = (*TOKENIZERS, CLIP_L, CLIP_G)


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
    """The folders and commands of one seed.

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
    def teacher_text(self) -> pathlib.Path:
        """The checkpoint with the teacher's own text encoder."""
        return self.folder / 'teacher_checkpoint'

    @property
    def distilled_text(self) -> pathlib.Path:
        """The checkpoint with the distilled text encoder."""
        return self.folder / 'checkpoint'

    @property
    def without_cosine(self) -> pathlib.Path:
        """The checkpoint with the text encoder that was distilled without the cosine term."""
        return self.folder / 'without_cosine_checkpoint'

    @property
    def students(self) -> tuple[str, ...]:
        """The names of the students; the first one is shipped."""
        return self.tier.students

    def result(self, name: str) -> pathlib.Path:
        """The result folder of a program."""
        return self.folder / name / 'result'

    def steps(self) -> list[Step]:
        """Return all commands in order."""
        pruning = self._pruning() if self.tier.ablations else ()
        steps = [*self._autoencoder(), *self._teacher(), *self._text(), *pruning, *self._students()]
        return [*steps, self._evaluation(tuple(step.result for step in steps))]

    def _autoencoder(self) -> Iterator[Step]:
        language = self.out / 'language'
        yield Step(
            'language', language / TEACHER_ENCODER / 'config.json', 'train.shapes.language', ['--out', str(language)]
        )
        yield self._clips('scenes', self.tier.clips, self.tier.size, seed=1)
        native = self.out / 'autoencoder' / 'result' / AUTOENCODER
        data = f'--config.data=shapes:{self.tier.world}'
        yield self._train('autoencoder', self.out / 'autoencoder', native, [data], seed=0)
        start = [data, f'--config.decoder.start={native}']
        yield self._train('decoder', self.out / 'decoder', self._small_vae, start, seed=0)
        # Latents need the encoder only; both autoencoders share it.
        base = self.out / 'base_checkpoint'
        parts = {base / name: language / name for name in LANGUAGE}
        parts[base / VAE] = native
        text = ['--text', 't5', '--text-encoder', str(language / TEACHER_ENCODER)]
        yield self._latents('latents', 'scenes', base, 8, text)._replace(parts=parts)

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

    def _teacher(self) -> Iterator[Step]:
        yield self._train('teacher', self.folder / 'teacher', self.result('teacher') / WITH_EMBEDDER, [self._data])

    def _text(self) -> Iterator[Step]:
        prompts, language = self.out / 'prompts', self.out / 'language'
        arguments = ['--checkpoint', str(self.out / 'base_checkpoint'), '--file', str(self.out / 'prompts.txt')]
        yield Step('prompts', prompts / 'dataset_info.json', 'train.prompts', [*arguments, '--out', str(prompts)])
        common = [
            f'--config.data={prompts}',
            f'--config.teacher={language / TEACHER_ENCODER}',
            f'--config.embedder={self.result("teacher") / WITH_EMBEDDER}',
            f'--config.encoder={language / TEXT_ENCODER}',
        ]
        variants = {'text': []}
        if self.tier.ablations:
            variants['text_without_cosine'] = ['--config.text.cosine_weight=0.0']
        for name, changes in variants.items():
            yield self._train('text', self.folder / name, self.result(name) / ADAPTER, [*common, *changes], name)

    def _pruning(self) -> Iterator[Step]:
        full, choice = self.result('teacher') / WITH_EMBEDDER, self.folder / 'choice'
        count = str(min(32, self.tier.captions))
        arguments = ['--denoiser', str(full), '--data', str(self.out / 'latents'), '--out', str(choice)]
        arguments += ['--remove', '1', '--prompts', count, '--samples', '1', '--check-prompts', count, '--batch', '16']
        arguments += [*self._sampling, '--dtype', 'float32']
        yield Step('importance', choice / 'keep.json', 'train.prune', ['select', *arguments])
        common = [f'--config.denoiser={full}', f'--config.keep={choice / "keep.json"}', self._data]
        start = [f'--config.start={self.result("stage1") / WITH_EMBEDDER}']
        for name, stage, more in (('stage1', 1, []), ('stage2', 2, start), ('stage2_alone', 2, [])):
            yield self._train(
                'pruning', self.folder / name, self.result(name) / DENOISER, [*common, *more], name, f'stage{stage}'
            )

    def _students(self) -> Iterator[Step]:
        base, teacher, text = self.out / 'base_checkpoint', self.result('teacher'), self.result('text')
        parts = {self.distilled_text / name: base / name for name in LANGUAGE} | {
            self.distilled_text / VAE: self._small_vae
        }
        parts |= {self.distilled_text / DENOISER: teacher / DENOISER, self.distilled_text / ADAPTER: text / ADAPTER}
        parts[self.distilled_text / TEXT_ENCODER] = text / TEXT_ENCODER
        for root in (self.teacher_text, self.without_cosine) if self.tier.ablations else (self.teacher_text,):
            parts |= {root / name: base / name for name in LANGUAGE} | {root / VAE: self._small_vae}
        if self.tier.ablations:
            parts[self.without_cosine / TEXT_ENCODER] = self.result('text_without_cosine') / TEXT_ENCODER
        parts |= {self.teacher_text / DENOISER: teacher / DENOISER, self.teacher_text / ADAPTER: teacher / ADAPTER}
        parts[self.teacher_text / TEXT_ENCODER] = self.out / 'language' / TEACHER_ENCODER
        yield self._samples(parts)
        for name in self.students:
            yield self._student(name)

    def _samples(self, parts: Mapping[pathlib.Path, pathlib.Path]) -> Step:
        """Return the sampling of the teacher's videos of the trained captions."""
        samples = self.folder / 'teacher_samples'
        arguments = ['--checkpoint', str(self.distilled_text), '--prompts-file', str(self.out / 'prompts.txt')]
        arguments += ['--out', str(samples), '--count', str(self.tier.samples), *self.tier.size, *self._sampling]
        arguments += ['--prompt-modifier', '', '--negative-prompt', '', '--seed', str(self.seed), '--batch', '32']
        arguments += ['--dtype', 'float32', '--store-dtype', 'float32']
        return Step('samples', samples / 'dataset_info.json', 'train.teacher_samples', arguments, parts)

    def _student(self, name: str) -> Step:
        """Return the distillation of a student."""
        student = STUDENTS[name]
        arguments = [f'--config.data={self.folder / "teacher_samples"}', f'--config.checkpoint={self.distilled_text}']
        arguments += [f'--config.dmd.{key}={self.tier.guidance}' for key in ('guidance', 'first_guidance')]
        arguments += [f'--config.dmd.{key}={self.tier.steps}' for key in ('teacher_steps', 'teacher_first_steps')]
        arguments += student.settings
        if student.start is not None:
            arguments.append(f'--config.dmd.start={self.result(student.start) / STUDENT}')
        workdir, result = self.folder / name, self.result(name) / STUDENT
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
    def _small_vae(self) -> pathlib.Path:
        """The video VAE with the small decoder."""
        return self.out / 'decoder' / 'result' / VAE

    @property
    def _data(self) -> str:
        return f'--config.data={self.out / "latents"}'

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
        key = 'students' if program == 'dmd' else program
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
