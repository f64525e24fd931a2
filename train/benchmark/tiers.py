"""Sizes of the benchmark: the world, the length of its clips, and the steps of each program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from neodragon_jax.generation.defaults import check_size
from train.benchmark.students import HISTORIES, ONE_STEP, RECIPES, STUDENTS


@dataclasses.dataclass(frozen=True)
class Tier:
    """A size of the benchmark.

    Attributes:
      world: name of a world of `train.shapes.world`.
      other_starts: further worlds whose checkpoints a continuation takes.
      clips: number of clips to train denoisers on.
      samples: number of teacher samples for distillation.
      captions: held-out captions for evaluation.
      steps: sampling steps per stage of the teacher.
      guidance: guidance scale of the teacher, in sampling and in distillation.
      training: steps of each program; programs not listed use their presets. Trainings of an existing teacher are
        listed by their recipe.
      settings: other settings of each program, listed in the same way.
      students: names from STUDENTS.
      ablations: whether pruning is trained, and the text encoder without the cosine term.
      half_at_first: whether half of the examples of a teacher from random weights are of unit 0.
      further: recipes of configs/teacher.py, in order, by which the teacher of an existing checkpoint is trained
        further; () keeps it as it is.
      continued: students of an existing checkpoint's teacher.
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
    half_at_first: bool = False
    further: tuple[str, ...] = ('stills', 'continued')
    continued: tuple[str, ...] = ('first_frame',)
    other_starts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = {*self.students, *self.continued} - set(STUDENTS)
        assert not unknown, f'no such students: {unknown}'
        check_size(self.frames, self.height, self.width)

    @property
    def units(self) -> int:
        """Units > 0 of a clip."""
        return (self.frames - 1) // 8

    @property
    def starts(self) -> tuple[str, ...]:
        """The worlds whose checkpoints a continuation takes."""
        return self.world, *self.other_starts

    @property
    def unit_weights(self) -> tuple[float, ...]:
        """Relative frequencies of a clip's units in training: unit 0 as often as all others together."""
        return (float(self.units), *(1.0,) * self.units)

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
_DEEPER = ('--config.teacher.sizes.num_layers=12', '--config.teacher.context_embedder=False')


def _constant(section: str, rate: float, warmup: int) -> tuple[str, ...]:
    """Return settings of AdamW at a constant rate."""
    values = {'kind': 'adamw', 'learning_rate': rate, 'warmup_steps': warmup, 'schedule': 'constant', 'decay_steps': 0}
    return tuple(f'--config.{section}.optimizer.{name}={value}' for name, value in values.items())


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
                'students': (
                    '--config.dmd.student.decay_steps=3000',
                    '--config.dmd.own_history.ramp_start=750',
                    '--config.dmd.own_history.ramp_steps=750',
                ),
            },
        ),
        # Longer and larger clips with light and texture, for pictures that look like video; not trained yet. The world
        # has ten times the combinations of that of tier cpu, and a latent clip seven times the tokens. The steps are
        # such that a seed takes about six hours of a machine with two cores that computes 40 GFLOP/s on each. Measured
        # there: the teacher makes 1.35 steps/s, and 3.9 clips/s are encoded. Estimated from tier cpu: 1.6 samples/s
        # and 1.9 s per step of the student. Hours: teacher 2.7, student 1.1, autoencoder and decoder 0.8, latents 0.6,
        # samples 0.5, the rest 0.3. The samples are four of every trained combination. The autoencoder draws whole
        # scenes at half the size, 64x64, at a quarter of the cost per step; a convolution learns the same edges there.
        # No training on stills precedes that of the teacher, as in a continuation; instead, half of its examples are
        # of unit 0.
        'vivid': Tier(
            world='vivid',
            frames=33,
            height=128,
            width=128,
            clips=8192,
            samples=2880,
            captions=144,
            training={'autoencoder': 5000, 'decoder': 6000, 'teacher': 13_000},
            settings={
                'autoencoder': ('--config.autoencoder.optimizer.decay_steps=5000',),
                'decoder': ('--config.decoder.optimizer.decay_steps=6000',),
                'teacher': ('--config.teacher.optimizer.decay_steps=13000',),
            },
            students=('first_frame',),
            ablations=False,
            half_at_first=True,
        ),
        # Recipes of one-step students, on the teacher of tier cpu, or on that of an existing checkpoint.
        'one_step': Tier(students=ONE_STEP, ablations=False, further=(), continued=RECIPES),
        # Nine latent frames, and neither direction nor speed in the caption, so that only the history determines them.
        # Several clips of every caption show the variety of direction.
        'collapse': Tier(
            world='collapse',
            frames=65,
            students=HISTORIES,
            ablations=False,
            further=('continued',),
            continued=HISTORIES,
            other_starts=('cpu',),
            # All units alike: this tier shows the motion of the last ones.
            settings={'continued': ('--config.teacher.unit_weights=()',)},
        ),
        # Twelve blocks, to prune.
        'recovery': Tier(
            steps=(4, 4, 4),
            students=(),
            ablations=False,
            further=('continued',),
            continued=(),
            training={'teacher': 1500},
            settings={
                'teacher': (*_DEEPER, '--config.teacher.optimizer.decay_steps=1500'),
                'pruning': _constant('flow', 1e-3, 10),
            },
        ),
        # Text encoders alone, as the paper trains them: DT5 frozen, in bfloat16, by AdamW.
        'cosine': Tier(
            students=(),
            ablations=False,
            training={'text': 1000},
            settings={
                'text': (
                    *_constant('text', 1e-3, 50),
                    '--config.text.encoder=frozen',
                    '--config.text.dtype=bfloat16',
                    '--config.loop.log_every=1',
                ),
            },
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
                'stills': 2,
                'continued': 2,
                'text': 2,
                'stage1': 2,
                'stage2': 2,
                'students': 2,
            },
            settings={
                'autoencoder': ('--config.clips.held_out=2', '--config.autoencoder.evaluation.batch=2'),
                'decoder': ('--config.clips.held_out=2', '--config.decoder.evaluation.batch=2'),
                **dict.fromkeys(
                    ('teacher', 'stills', 'continued'), tuple(flag.format(section='teacher') for flag in _FEW)
                ),
                'text': ('--config.text.held_out=8', '--config.text.held_out_batch=8'),
                'pruning': tuple(flag.format(section='flow') for flag in _FEW),
                'students': ('--config.loop.batch_size=8',),
            },
            students=('student',),
        ),
    }
)
