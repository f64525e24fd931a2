"""Sizes of the benchmark: the world, the length of its clips, and the steps of each program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from train.benchmark.students import HISTORIES, ONE_STEP, STUDENTS


@dataclasses.dataclass(frozen=True)
class Tier:
    """A size of the benchmark.

    Attributes:
      world: name of a world of `train.shapes.world`.
      clips: number of clips to train denoisers on.
      samples: number of teacher samples for distillation.
      captions: held-out captions for evaluation.
      steps: sampling steps per stage of the teacher.
      guidance: guidance scale of the teacher, in sampling and in distillation.
      training: steps of each program; programs not listed use their presets.
      settings: other settings of each program.
      students: names from STUDENTS.
      ablations: whether pruning is trained, and the text encoder without the cosine term.
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
    students: tuple[str, ...] = ('student', 'regression', 'paper', 'own_history')
    ablations: bool = True

    def __post_init__(self) -> None:
        unknown = set(self.students) - set(STUDENTS)
        assert not unknown, f'no such students: {unknown}'

    @property
    def units(self) -> int:
        """Units > 0 of a clip."""
        return (self.frames - 1) // 8

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
        # Three latent frames are too few for a student to drift on its own history, so no own_history here.
        'cpu': Tier(students=('student', 'regression', 'paper')),
        # Five latent frames, sizes, speeds, and turns that the captions omit: the future is uncertain.
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
        # Recipes of one-step students, on the teacher of tier cpu.
        'one_step': Tier(students=ONE_STEP, ablations=False),
        # Nine latent frames, and neither direction nor speed in the caption, so that only the history determines them.
        # Many clips of few captions show the variety of direction.
        'collapse': Tier(
            world='collapse',
            frames=65,
            clips=8192,
            samples=2048,
            captions=192,
            training={'teacher': 12_000, 'students': 1400},
            settings={
                'teacher': ('--config.teacher.optimizer.decay_steps=12000',),
                'students': (
                    '--config.dmd.student.decay_steps=1400',
                    '--config.dmd.own_history.ramp_start=350',
                    '--config.dmd.own_history.ramp_steps=350',
                ),
            },
            students=HISTORIES,
            ablations=False,
        ),
        # Runs every command of the chain once; the results are noise.
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
