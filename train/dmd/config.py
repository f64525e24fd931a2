"""Options of the step distillation (`train.dmd`)."""

from __future__ import annotations

import dataclasses

from neodragon_jax.base.errors import InputError
from neodragon_jax.models.attention import STRATEGIES
from neodragon_jax.models.mmdit import REMAT_POLICIES
from train.data import DTYPES
from train.dmd.evaluation import EvaluationConfig
from train.dmd.objectives.weighted import ObjectivesConfig
from train.dmd.own_history import OwnHistoryConfig
from train.dmd.prompt_source import check_prompt_only
from train.dmd.state import AverageConfig
from train.dmd.trained import DenoiserLoraConfig
from train.flow import losses
from train.flow.flow_matching import check_weights
from train.runtime.optimizer import OptimizerConfig
from train.runtime.platform import AUTO
from train.runtime.settings import CheckpointText, PathText, top_level

INPUTS, LEVELS = ('samples', 'prompts'), ('student', 'uniform')
# Denoiser calls of a 1-1-1 video of seven units -> the first unit that the student generates itself.
PROTOCOLS = {'18': 1, '21': 0}


@dataclasses.dataclass(frozen=True)
class DMDConfig:
    """Options of the distillation.

    Attributes:
      checkpoint: root folder of a released checkpoint; its multi-step denoiser is the teacher.
      input: 'samples', videos of the teacher; or 'prompts', only prompts and first frames, with the student's own
        roll-outs in place of videos. That costs the student's 18 calls per video instead of the teacher's.
      frames: T, latent frames of the roll-outs, where the input is 'prompts'.
      start: folder of the denoiser from which student and fake model start, such as a pruned denoiser or the result of
        another distillation; '' for the teacher.
      keep: blocks of the teacher with which they start, as '0,1,2' or keep.json of `train.prune`; '' for all.
      student_lora, fake_lora: low-rank updates in place of all parameters, for less memory.
      student, fake: optimizers.
      protocol: denoiser calls of a 1-1-1 video of seven units: '18' starts from an external first frame, '21' does not.
      clean_prediction: 'exact', the clean latent that a flow implies; or 'paper', the flow extrapolated to sigma 0.
      student_steps, student_first_steps: the student's steps per stage, coarsest first, for units > 0 and for unit 0.
      fake_updates: updates of the fake model per update of the student.
      guidance, first_guidance: the teacher's scales for units > 0 and for unit 0.
      teacher_steps, teacher_first_steps: steps per stage with which the samples were made; they are compared with the
        samples' record, as the guidance is.
      objectives: the student's objectives and their weights.
      own_history: the share of examples whose history the student generated; none by default.
      stage_weights: relative frequency of the stages, coarsest first; () for equal ones (Pyramid-Flow: 1, 2, 1).
      unit_weights: relative frequency of the units, from the first that the student generates; () for equal ones.
      pairs: take the student's inputs and the regression's targets from the teacher's own paths, which the samples hold
        if they were made with --store-starts.
      levels: 'student', examples at the levels of the student's own steps; or 'uniform', in 0..1, for the consistency
        objective.
      average: of the student; evaluated, and written as the result.
      evaluation: evaluation of the student during the run, every `loop.evaluate_every` steps.
      accumulate: number of parts of a batch; their gradients are computed one after the other, in less memory.
      gather_student: gather the student's blocks once per iteration for its roll-outs and the fake model's examples,
        instead of once per call, where a mesh splits parameters; each device then holds them whole.
      dtype: compute type of the denoisers, 'float32' or 'bfloat16'; masters stay float32.
      float32_probes: where teacher and fake model are compared, keep the token streams between their layers, and their
        heads, in float32; with 'bfloat16' the rounding of both is several percent of their difference.
      remat: what the backward pass keeps instead of computing it again: 'full' keeps least, then 'kernel', 'dots' and
        'none', which keeps all.
      attention: 'auto', which is 'splash' on TPUs and 'masked' elsewhere, or a strategy of models/attention.py.
      seed: of the order of the stages.
    """

    checkpoint: CheckpointText = top_level()
    teacher: PathText = top_level('')
    input: str = 'samples'
    frames: int = 7
    start: PathText = ''
    keep: str = ''
    student_lora: DenoiserLoraConfig = dataclasses.field(default_factory=DenoiserLoraConfig)
    fake_lora: DenoiserLoraConfig = dataclasses.field(default_factory=DenoiserLoraConfig)
    protocol: str = '18'
    clean_prediction: str = 'exact'
    student_steps: tuple[int, ...] = (1, 1, 1)
    student_first_steps: tuple[int, ...] = (1, 1, 1)
    fake_updates: int = 2
    guidance: float = 5.0
    first_guidance: float = 7.0
    teacher_steps: tuple[int, ...] = (10, 10, 10)
    teacher_first_steps: tuple[int, ...] = (20, 20, 20)
    objectives: ObjectivesConfig = dataclasses.field(default_factory=ObjectivesConfig)
    own_history: OwnHistoryConfig = dataclasses.field(default_factory=OwnHistoryConfig)
    stage_weights: tuple[float, ...] = ()
    unit_weights: tuple[float, ...] = ()
    pairs: bool = False
    levels: str = 'student'
    average: AverageConfig = dataclasses.field(default_factory=AverageConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    accumulate: int = 1
    gather_student: bool = False
    dtype: str = 'bfloat16'
    float32_probes: bool = False
    remat: str = 'kernel'
    attention: str = AUTO
    seed: int = top_level(0)
    student: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    fake: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        choices = {
            'input': INPUTS,
            'levels': LEVELS,
            'protocol': PROTOCOLS,
            'clean_prediction': losses.CLEAN_PREDICTIONS,
            'dtype': DTYPES,
            'remat': ('none', *REMAT_POLICIES),
            'attention': (AUTO, *STRATEGIES),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f'{name} is {getattr(self, name)!r}; use one of {", ".join(known)}.')
        if self.fake_updates < 1:
            raise InputError(f'fake_updates is {self.fake_updates}; at least one is needed.')
        for name in ('student_steps', 'student_first_steps', 'teacher_steps', 'teacher_first_steps'):
            count = getattr(self, name)
            if len(count) != 3 or min(count) < 1:
                raise InputError(f'{name} is {count}; give three positive numbers, one per stage.')
        if self.input == 'prompts':
            own, objectives = self.own_history, self.objectives
            used = objectives.regression.used, objectives.adversarial.used
            check_prompt_only(self.protocol, (own.first, own.last), own.arrive, *used, self.evaluation.videos)
        self._check_levels()
        if self.accumulate < 1:
            raise InputError(f'accumulate is {self.accumulate}; it must be at least 1.')
        check_weights('stage_weights', self.stage_weights, count=3)
        check_weights('unit_weights', self.unit_weights)

    def _check_levels(self) -> None:
        """Raise InputError unless the examples suit the objectives."""
        objectives = self.objectives
        if self.levels == 'uniform' and self.own_history.enabled and self.own_history.arrive:
            raise InputError(
                "levels is 'uniform', but own histories arrive at the student's steps; set own_history.arrive to False."
            )
        if self.levels == 'student' and objectives.consistency.used:
            raise InputError(
                "objectives.consistency needs examples at all levels, but levels is 'student'; set it to 'uniform'."
            )
        if self.levels == 'uniform' and objectives.progressive.used:
            raise InputError(
                "levels is 'uniform', but objectives.progressive covers the student's own steps; set levels to "
                "'student'."
            )
        if objectives.progressive.needs_start and not self.start:
            raise InputError(
                "objectives.progressive.finer is 'start', but start is ''; name the folder of the finer student."
            )
        if self.pairs and self.input == 'prompts':
            raise InputError("pairs is True, but input is 'prompts', without stored paths; set one of them back.")
        if self.pairs and not objectives.regression.used:
            raise InputError(
                'pairs is True, but objectives.regression.weight is 0, so that no target is used; set one of them back.'
            )

    @property
    def updates(self) -> int:
        """N, the batches that one iteration reads."""
        return self.fake_updates + 1
