"""Options of the step distillation (`train.dmd`)."""

from __future__ import annotations

import dataclasses

from neodragon_jax.base.errors import InputError
from neodragon_jax.models.attention import STRATEGIES
from neodragon_jax.models.mmdit import REMAT_POLICIES
from train.data import DTYPES
from train.dmd.rollout import OwnHistoryConfig
from train.flow import losses
from train.runtime.optimizer import OptimizerConfig

# Denoiser calls of a 1-1-1 video of seven units -> the first unit that the student generates itself.
PROTOCOLS = {'18': 1, '21': 0}


@dataclasses.dataclass(frozen=True)
class DMDConfig:
    """Options of the objective.

    Attributes:
      checkpoint: root folder of a released checkpoint; its multi-step denoiser is the teacher.
      protocol: denoiser calls of a 1-1-1 video of seven units: '18' starts from an external first frame, '21' does not.
      clean_prediction: 'exact' or 'paper', see `losses.clean_prediction`.
      student_steps: n of the n-n-n student.
      fake_updates: updates of the fake model per update of the student.
      student_taus: local levels at which the student's gradient is measured.
      guidance, first_guidance: the teacher's scales for units > 0 and for unit 0.
      distribution_weight: factor of the distribution matching gradient; 0 leaves regression alone, as a control.
      cauchy_weight: factor of the regression loss; 0 leaves distribution matching alone.
      own_history: which examples stand behind frames that the student itself generated; by default none.
      dtype: compute type of the denoisers, 'float32' or 'bfloat16'; masters stay float32.
      remat, attention: see `PyramidMMDiT`.
      seed: of the order of the stages.
    """

    checkpoint: str
    protocol: str = '18'
    clean_prediction: str = 'exact'
    student_steps: int = 1
    fake_updates: int = 2
    # Four evenly spaced levels inside (0, 1). Both ends teach nothing: at 1 the coarsest stage is pure noise, which
    # no longer depends on z_theta, and at 0 the finest is z_theta itself, of which no model removes noise.
    student_taus: tuple[float, ...] = (0.125, 0.375, 0.625, 0.875)
    guidance: float = 5.0
    first_guidance: float = 7.0
    distribution_weight: float = 1.0
    cauchy_weight: float = 0.5
    own_history: OwnHistoryConfig = dataclasses.field(default_factory=OwnHistoryConfig)
    dtype: str = 'bfloat16'
    remat: str = 'full'
    attention: str = 'masked'
    seed: int = 0
    student: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    fake: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        choices = {
            'protocol': PROTOCOLS,
            'clean_prediction': losses.CLEAN_PREDICTIONS,
            'dtype': DTYPES,
            'remat': ('none', *REMAT_POLICIES),
            'attention': STRATEGIES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f'{name} is {getattr(self, name)!r}; use one of {", ".join(known)}.')
        for name in ('student_steps', 'fake_updates'):
            if getattr(self, name) < 1:
                raise InputError(f'{name} is {getattr(self, name)}; at least one is needed.')
        if not self.student_taus or not all(0 <= tau <= 1 for tau in self.student_taus):
            raise InputError(f'student_taus is {self.student_taus}; give at least one level in 0..1.')
        for name in ('distribution_weight', 'cauchy_weight'):
            if getattr(self, name) < 0:
                raise InputError(f'{name} is {getattr(self, name)}; it must be at least 0.')
        if not (self.distribution_weight or self.cauchy_weight):
            raise InputError('distribution_weight and cauchy_weight are both 0: nothing is left to learn; raise one.')

    @property
    def updates(self) -> int:
        """N, the batches that one iteration reads."""
        return self.fake_updates + 1
