"""What `train.benchmark` runs: the tiers, and the commands of the chain in their order.

    autoencoder -> { small decoder, latents -> teacher -> { pruning, text } } -> samples -> students -> evaluation

Every entry is one of the project's own programs with the settings of its preset `shapes`, as a user would type it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from configs import dmd
from neodragon_jax.checkpoint.folders import CLIP_G, CLIP_L, STUDENT, TOKENIZERS
from neodragon_jax.checkpoint.folders import PYRAMID_FLOW_VAE as AUTOENCODER
from neodragon_jax.checkpoint.folders import T5 as TEXT_ENCODER
from neodragon_jax.checkpoint.folders import TEACHER as DENOISER
from neodragon_jax.checkpoint.folders import TEACHER_ADAPTER as ADAPTER
from neodragon_jax.checkpoint.folders import VIDEO_VAE as VAE
from neodragon_jax.generation import defaults as generation
from train.shapes.language import TEACHER_ENCODER
from train.teacher.program import PYRAMID_FLOW as WITH_EMBEDDER

# Folders of the text side that nothing trains.
LANGUAGE = (*TOKENIZERS, CLIP_L, CLIP_G)

# The students: name -> settings that differ from the preset.
STUDENTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        'student': (),
        'regression': ('--config.dmd.distribution_weight=0.0',),
        'paper': ('--config.dmd.clean_prediction=paper',),
        'own_history': (
            '--config.dmd.own_history.last=1.0',
            '--config.dmd.own_history.ramp_start={quarter}',
            '--config.dmd.own_history.ramp_steps={quarter}',
        ),
    }
)


@dataclasses.dataclass(frozen=True)
class Tier:
    """A size of the benchmark.

    Attributes:
      world: of `train.shapes.world`.
      clips: to train denoisers on.
      samples: of the teacher, for distillation.
      captions: held out, for which videos are judged.
      steps: sampling steps per stage of the teacher.
      guidance: of the teacher, while sampling and while distilling.
      training: steps of each program; what is not named keeps its preset's.
      settings: other settings of each program.
      students: which of STUDENTS.
    """

    world: str = 'cpu'
    frames: int = 17
    height: int = 64
    width: int = 64
    clips: int = 4096
    samples: int = 1024
    captions: int = 96
    steps: tuple[int, int, int] = (8, 8, 8)
    guidance: float = 2.0
    training: Mapping[str, int] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    students: tuple[str, ...] = tuple(STUDENTS)

    @property
    def size(self) -> list[str]:
        """The options of a clip's size."""
        return ['--frames', str(self.frames), '--height', str(self.height), '--width', str(self.width)]


_WIDER = tuple(
    f'--config.teacher.sizes.{name}={value}'
    for name, value in {
        'num_layers': 8,
        'num_attention_heads': 4,
        'attention_head_dim': 64,
        'caption_projection_dim': 256,
    }.items()
)
_FEW = ('--config.{section}.evaluation.examples=8', '--config.{section}.evaluation.batch=8')

TIERS: Mapping[str, Tier] = MappingProxyType(
    {
        # Three latent frames are too few for a student to drift behind its own.
        'cpu': Tier(students=('student', 'regression', 'paper')),
        # Five latent frames, sizes, speeds, and turns that no caption tells: the future is uncertain.
        'gpu': Tier(
            world='gpu',
            frames=33,
            clips=40_000,
            samples=8192,
            captions=216,
            training={'autoencoder': 20_000, 'decoder': 10_000, 'teacher': 30_000, 'text': 6000, 'students': 3000},
            settings={
                'autoencoder': ('--config.autoencoder.optimizer.decay_steps=20000',),
                'decoder': ('--config.decoder.optimizer.decay_steps=10000',),
                'teacher': (*_WIDER, '--config.loop.batch_size=64', '--config.teacher.optimizer.decay_steps=30000'),
                'text': ('--config.text.optimizer.decay_steps=6000',),
                'students': ('--config.dmd.student.decay_steps=3000',),
            },
        ),
        # Every command of the chain once, to see that it runs: what comes out is noise.
        'fast': Tier(
            clips=24,
            samples=16,
            captions=4,
            steps=(1, 1, 1),
            training={
                'autoencoder': 2,
                'decoder': 2,
                'teacher': 2,
                'text': 2,
                'stage1': 2,
                'stage2': 2,
                'students': 2,
            },
            settings={
                'autoencoder': ('--config.clips.held_out=2', '--config.autoencoder.evaluation.batch=2'),
                'decoder': ('--config.clips.held_out=2', '--config.decoder.evaluation.batch=2'),
                'teacher': tuple(flag.format(section='teacher') for flag in _FEW),
                'text': ('--config.text.held_out=8', '--config.text.held_out_batch=8'),
                'pruning': tuple(flag.format(section='flow') for flag in _FEW),
                'students': ('--config.loop.batch_size=8',),
            },
            students=('student',),
        ),
    }
)


class Step(NamedTuple):
    """One command of the chain.

    Attributes:
      name: of the step.
      result: the file that is there when it is done.
      module: of the program.
      arguments: of it.
      parts: before it runs, component folders to copy into a checkpoint: target -> source.
      after: results of other steps that it waits for, besides what its arguments name.
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
      out: of the benchmark. Codec, scenes and language are there, made once for all seeds.
    """

    tier: Tier
    out: pathlib.Path
    seed: int

    @property
    def folder(self) -> pathlib.Path:
        """What belongs to the seed."""
        return self.out / f'seed-{self.seed}'

    @property
    def big(self) -> pathlib.Path:
        """The checkpoint with the teacher's own text encoder."""
        return self.folder / 'teacher_checkpoint'

    @property
    def small(self) -> pathlib.Path:
        """The checkpoint with the distilled text encoder."""
        return self.folder / 'checkpoint'

    @property
    def without_cosine(self) -> pathlib.Path:
        """The checkpoint with the text encoder that was distilled without the cosine term."""
        return self.folder / 'without_cosine_checkpoint'

    def result(self, name: str) -> pathlib.Path:
        """The result folder of a program."""
        return self.folder / name / 'result'

    def steps(self) -> list[Step]:
        """Return all commands in order."""
        steps = [*self._codec(), *self._teacher(), *self._text(), *self._pruning(), *self._students()]
        return [*steps, self._evaluation(tuple(step.result for step in steps))]

    def _codec(self) -> Iterator[Step]:
        language, scenes, world = self.out / 'language', self.out / 'scenes', self.tier.world
        yield Step(
            'language', language / TEACHER_ENCODER / 'config.json', 'train.shapes.language', ['--out', str(language)]
        )
        options = ['--world', world, '--count', str(self.tier.clips), *self.tier.size, '--paraphrase', '--seed', '1']
        yield Step('scenes', scenes / 'dataset_info.json', 'train.moving_shapes', ['--out', str(scenes), *options])
        native = self.out / 'autoencoder' / 'result' / AUTOENCODER
        data = f'--config.data=shapes:{world}'
        yield self._train('autoencoder', self.out / 'autoencoder', native, [data], seed=0)
        start = [data, f'--config.decoder.start={native}']
        yield self._train('decoder', self.out / 'decoder', self._small_vae, start, seed=0)
        # Latents need the encoder only, which is the same in both.
        base, latents = self.out / 'base_checkpoint', self.out / 'latents'
        parts = {base / name: language / name for name in LANGUAGE}
        parts[base / VAE] = native
        arguments = ['--checkpoint', str(base), '--clips', str(scenes), '--out', str(latents), '--text', 't5']
        arguments += ['--text-encoder', str(language / TEACHER_ENCODER), '--negative-prompt', '', '--batch', '8']
        arguments += ['--dtype', 'float32', '--store-dtype', 'float32']
        yield Step('latents', latents / 'dataset_info.json', 'train.latents', arguments, parts)

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
        for name, changes in {'text': [], 'text_without_cosine': ['--config.text.cosine_weight=0.0']}.items():
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
        samples, base = self.folder / 'teacher_samples', self.out / 'base_checkpoint'
        teacher, text = self.result('teacher'), self.result('text')
        parts = {self.small / name: base / name for name in LANGUAGE} | {self.small / VAE: self._small_vae}
        parts |= {self.small / DENOISER: teacher / DENOISER, self.small / ADAPTER: text / ADAPTER}
        parts[self.small / TEXT_ENCODER] = text / TEXT_ENCODER
        for root in (self.big, self.without_cosine):
            parts |= {root / name: base / name for name in LANGUAGE} | {root / VAE: self._small_vae}
        parts[self.without_cosine / TEXT_ENCODER] = self.result('text_without_cosine') / TEXT_ENCODER
        parts |= {self.big / DENOISER: teacher / DENOISER, self.big / ADAPTER: teacher / ADAPTER}
        parts[self.big / TEXT_ENCODER] = self.out / 'language' / TEACHER_ENCODER
        arguments = ['--checkpoint', str(self.small), '--prompts-file', str(self.out / 'prompts.txt')]
        arguments += ['--out', str(samples), '--count', str(self.tier.samples), *self.tier.size, *self._sampling]
        arguments += ['--prompt-modifier', '', '--negative-prompt', '', '--seed', str(self.seed), '--batch', '32']
        arguments += ['--dtype', 'float32', '--store-dtype', 'float32']
        yield Step('samples', samples / 'dataset_info.json', 'train.teacher_samples', arguments, parts)
        common = [f'--config.data={samples}', f'--config.checkpoint={self.small}']
        common += [f'--config.dmd.{name}={self.tier.guidance}' for name in ('guidance', 'first_guidance')]
        for name in self.tier.students:
            changes = [change.format(quarter=self._quarter) for change in STUDENTS[name]]
            yield self._train('dmd', self.folder / name, self.result(name) / STUDENT, [*common, *changes], name)

    def _evaluation(self, after: tuple[pathlib.Path, ...]) -> Step:
        """Return the judging of all systems, which ends with the checkpoint to ship."""
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
    def _quarter(self) -> int:
        """A quarter of the students' steps, for what is switched on as they learn."""
        steps: Any = dmd.get_config('shapes').to_dict()['loop']['steps']
        return self.tier.training.get('students', steps) // 4

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
    ) -> Step:
        """Return a training program with its preset `shapes` and what the tier changes of it."""
        config = f'configs/{program}.py:{preset}-shapes' if preset else f'configs/{program}.py:shapes'
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
