"""Options of the teacher's training."""

from __future__ import annotations

import dataclasses

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.models.attention import STRATEGIES
from neodragon_jax.models.mmdit import REMAT_POLICIES
from train.data.record_spec import DTYPES
from train.flow.flow_matching import CORRUPTION, check_weights
from train.runtime.optimizer import OptimizerConfig
from train.runtime.platform import AUTO
from train.runtime.settings import PathText, top_level
from train.teacher.evaluation import EvaluationConfig

STAGES_PER_STEP = ('one', 'all')


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """Options of the objective.

    Attributes:
      sizes: sizes of the denoiser; `joint_attention_dim` is the width of the samples' text states.
      context_embedder: also train Pyramid-Flow's linear embedding of the text states. Without it the states must have
        the denoiser's width, like the output of a context adapter.
      start: component folder of a denoiser to continue from, with or without an embedder, in place of `sizes` and
        `context_embedder`; '' begins with fresh parameters.
      stages: 'one' trains a stage per step, drawn for the whole batch; 'all' trains every sample at every stage.
      accumulate: parts of a batch whose gradients are computed one after the other, to save memory.
      caption_dropout: probability of training without the caption, as guidance requires.
      corruption: largest amount of noise in the history.
      ema_decay: decay of the averaged parameters, which are evaluated and saved; 0 for no average.
      dtype: compute type, 'float32' or 'bfloat16'; master parameters stay float32.
      remat: what the backward pass keeps instead of computing it again: 'full' keeps least, then 'kernel', 'dots' and
        'none', which keeps all.
      attention: 'auto', which is 'splash' on TPUs and 'masked' elsewhere, or a strategy of models/attention.py.
      stage_weights: relative frequency of the stages of single-stage steps; () for equal ones (Pyramid-Flow: 1, 2, 1).
      unit_weights: relative frequency of the units; () for equal ones.
      seed: seed of the order of the stages.
    """

    sizes: MMDiTConfig = dataclasses.field(default_factory=lambda: MMDiTConfig(num_layers=24))
    context_embedder: bool = True
    start: PathText = ''
    stages: str = 'one'
    caption_dropout: float = 0.1
    corruption: float = CORRUPTION
    ema_decay: float = 0.0
    accumulate: int = 1
    dtype: str = 'bfloat16'
    remat: str = 'kernel'
    attention: str = AUTO
    stage_weights: tuple[float, ...] = ()
    unit_weights: tuple[float, ...] = ()
    seed: int = top_level(0)
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=5e-5, warmup_steps=1000)
    )
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        choices = {
            'stages': STAGES_PER_STEP,
            'dtype': DTYPES,
            'remat': ('none', *REMAT_POLICIES),
            'attention': (AUTO, *STRATEGIES),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f'{name} is {getattr(self, name)!r}; use one of {", ".join(known)}.')
        for name in ('caption_dropout', 'corruption', 'ema_decay'):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f'{name} is {getattr(self, name)}; it must be at least 0 and less than 1.')
        check_weights('stage_weights', self.stage_weights, count=3)
        check_weights('unit_weights', self.unit_weights)
        if self.accumulate < 1:
            raise InputError(f'accumulate is {self.accumulate}; it must be at least 1.')
