"""Pyramidal distribution matching as a program of the loop.

One step is compiled per stage; it holds every unit (the envelope). The alternative, a packed sequence of all three
stages, gives the same numbers but takes more than twice the time per sample (docs/results.md).

Legend: B batch, T latent frames (= units), H W full-size latent grid, h w the stage's, C channels, L text tokens,
D width, N updates in an iteration.
Source: Neodragon, arXiv 2511.06055, section on step distillation.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import as_json
from neodragon_jax.models.attention import with_forward_mode
from neodragon_jax.pyramid.sampler import Prompt
from neodragon_jax.pyramid.schedule import Schedule
from train.data import DTYPES
from train.dmd.config import PROTOCOLS, DMDConfig
from train.dmd.critic import FeatureCritic
from train.dmd.evaluation import StudentEvaluation, checkpoint_decoder
from train.dmd.examples import Examples
from train.dmd.gather import gather_blocks
from train.dmd.metrics import Sums, gradient_metrics, means
from train.dmd.own_history import OwnHistories
from train.dmd.result import NOT_AVERAGED, write_students
from train.dmd.rollout import Rollout
from train.dmd.state import DMDState, follow
from train.dmd.teacher import MultiStepTeacher, read_teacher
from train.dmd.trained import Start, Trained
from train.dmd.updates import Updates
from train.flow import flow_matching
from train.flow.stage_starts import start_name
from train.flow.unused import Unused, unused_in_stages
from train.runtime.gradients import value_and_grad
from train.runtime.model_flops import plain_denoiser
from train.runtime.optimizer import make_optimizer
from train.runtime.platform import attention_on_platform
from train.runtime.sharding import to_host

# Folded into a step's key for the random numbers of roll-outs.
OWN_HISTORY = 2**30
# Options that a resumed run may change: paths, precision, memory, evaluation and learning rates.
NOT_IN_IDENTITY = (
    'checkpoint',
    'dtype',
    'float32_probes',
    'remat',
    'attention',
    'accumulate',
    'gather_student',
    'evaluation',
    'student',
    'fake',
)


def check_width(given: int, taken: int) -> None:
    """Raise InputError unless the samples' text states are as wide as the denoiser takes them."""
    if given != taken:
        raise InputError(
            f'the text states of the samples are {given} wide, the denoiser takes {taken}: make the samples with the '
            'checkpoint that is distilled.'
        )


def examples_of(config: DMDConfig, frames: int, schedule: Schedule) -> Examples:
    """Return the distribution of the student's inputs; `frames` is T of the samples.

    Raises:
      InputError: there are too few unit weights.
    """
    first_unit = PROTOCOLS[config.protocol]
    flow_matching.check_unit_weights('config.dmd.unit_weights', config.unit_weights, frames - first_unit)
    return Examples(
        frames,
        first_unit,
        config.student_steps,
        config.student_first_steps,
        schedule,
        clean_prediction=config.clean_prediction,
        unit_weights=config.unit_weights,
        with_data=config.input == 'samples',
        uniform_levels=config.levels == 'uniform',
        pairs=config.pairs,
    )


def first_unit_of(config: DMDConfig, frames: int) -> int:
    """Return the first unit that the student generates; raise InputError if samples of `frames` units have none."""
    first_unit = PROTOCOLS[config.protocol]
    if frames <= first_unit:
        raise InputError(f'protocol {config.protocol} needs more than {first_unit} latent frames per sample.')
    return first_unit


def applies(config: DMDConfig, module: Any, teacher: Any) -> tuple[Callable[..., Any], ...]:
    """Return the apply functions of `Updates`: of student and fake model, of both probes, and in forward mode."""
    probe = module
    if config.float32_probes:
        probe, teacher = (each.clone(residual_dtype=jnp.float32) for each in (module, teacher))
    attention = attention_on_platform(config.attention)
    forward_mode = with_forward_mode(attention)
    tangent = module if forward_mode == attention else module.clone(attention=forward_mode)
    return module.apply, probe.apply, teacher.apply, tangent.apply


class DMD:
    """The step distillation as a program of the loop."""

    name, shown = 'dmd', ('fake_mse', 'cauchy', 'endpoint_mse', 'teacher_error', 'direction_rms')

    def __init__(
        self,
        config: DMDConfig,
        negative: Mapping[str, Any],
        frames: int,
        teacher: MultiStepTeacher | None = None,
        samples: Mapping[str, Any] | None = None,
        held_out: Mapping[str, Any] | None = None,
        start: Start | None = None,
    ) -> None:
        """Make the program.

        Args:
          negative: conditioning of the negative prompt, for guidance: text [L, D], text_mask [L], pooled [p].
          frames: T of the training samples.
          teacher: the teacher; by default it is read from `config.checkpoint`.
          samples: JSON that describes the samples; a resumed run must have the same.
          held_out: samples to evaluate on, with a leading axis; None for no evaluation.
          start: the denoiser from which student and fake model start; None for the teacher.
        Raises:
          InputError: the checkpoint cannot be read, or does not fit the samples.
        """
        teacher = read_teacher(config.checkpoint, config.teacher) if teacher is None else teacher
        check_width(negative['text'].shape[-1], teacher.module.config.width)
        self.config, self.schedule, self.frames = config, Schedule(spacing='even'), frames
        first_unit = first_unit_of(config, frames)
        self.fingerprint, self.adapter, self.teacher = teacher.fingerprint, teacher.adapter, teacher.params
        self.samples = dict(samples or {})
        attention = attention_on_platform(config.attention)
        options = {'dtype': DTYPES[config.dtype], 'remat': config.remat, 'attention': attention}
        start = Start(teacher.module) if start is None else start
        self.trained = Trained(start, teacher.module, config.student_lora, config.fake_lora)
        self.teacher_module, self.module = (
            module.clone(scan=True, **options) for module in (teacher.module, start.module)
        )
        self.negative = Prompt(*(negative[name] for name in ('text', 'text_mask', 'pooled')))  # pyright: ignore[reportArgumentType]
        self.student_tx, self.fake_tx = make_optimizer(config.student), make_optimizer(config.fake)
        self.critic_tx = make_optimizer(config.fake, fixed=())
        adversarial = config.objectives.adversarial
        self.critic = FeatureCritic(adversarial, self.module) if adversarial.used else None
        self.examples = examples_of(config, frames, self.schedule)
        rollout = Rollout(frames, config.student_steps, config.student_first_steps, self.schedule)
        self.own_histories = OwnHistories(config.own_history, rollout, first_unit)
        self.evaluation = None
        if held_out is not None:
            decode, parts = checkpoint_decoder(config.checkpoint), (rollout, first_unit, self.updates, self.negative)
            self.evaluation = StudentEvaluation(config.evaluation, *parts, held_out, decode)

    def plain(self) -> DMD:
        """Return the program without recomputation and padding, itself if it has none."""
        return _plain(self)

    @property
    def updates(self) -> Updates:
        """The losses of both models."""
        apply, probe, teacher, tangent = applies(self.config, self.module, self.teacher_module)
        scales = {'guidance': self.config.guidance, 'first_guidance': self.config.first_guidance}
        more = {'critic': self.critic, 'tangent_apply': tangent}
        return Updates(apply, probe, teacher, self.examples, self.config.objectives.parts(), **scales, **more)

    def frozen(self) -> dict[str, Any]:
        """Return the teacher's parameters, its negative prompt, and a start that is stored apart."""
        frozen = {'teacher': self.teacher, 'negative': self.negative}
        start = self.trained.start.params
        return frozen if start is None else frozen | {'start': start}

    def init_state(self, key: PRNGKeyArray, frozen: Any) -> DMDState:
        """Return both models at their start, with fresh optimizers."""
        state = DMDState.begin(*self.trained.begin(key, frozen), self.student_tx, self.fake_tx)
        critic = {} if self.critic is None else self.critic.init(key)
        average = jax.tree.map(jnp.copy, state.student) if self.config.average.decay else None
        return state.replace(critic=critic, critic_opt=self.critic_tx.init(critic), average=average)  # pyright: ignore[reportAttributeAccessIssue]

    def variant(self, step: int) -> int:
        """Return the stage of a step."""
        weights = self.config.stage_weights
        return flow_matching.stage_of_step(self.config.seed, step, self.schedule.stages, weights)

    def unused(self, variant: int, sample: Mapping[str, Any]) -> Unused:
        """Return the unused shares of the arithmetic of a step on samples of one shape."""
        config, first_unit = self.module.config, self.examples.first_unit
        return unused_in_stages([variant], sample, config, self.schedule, first_unit, self.config.unit_weights)

    def train_step(
        self, variant: int, state: DMDState, frozen: Any, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[DMDState, dict[str, Array]]:
        """Run one iteration at stage `variant`: the fake model's updates, then the student's.

        Args:
          batch: latents [N, B, T, H, W, C], text [N, B, L, D], text_mask [N, B, L], pooled [N, B, p].
        """
        keys, updates = jax.random.split(key, self.config.updates), self.updates
        student_of, fake_of = self.trained.whole(frozen)
        fixed = student_of(state.student)
        fixed = gather_blocks(fixed, self.module.dtype) if self.config.gather_student else fixed
        batches, own = self.batches(variant, state.step, fixed, batch, keys, jax.random.fold_in(key, OWN_HISTORY))
        shape = batch['latents'].shape[1:]
        fake_batches = {name: array[:-1] for name, array in batches.items()}
        fake_batches |= jax.vmap(functools.partial(updates.draw_fake, variant, shape))(keys[:-1])
        student_batch = {name: array[-1] for name, array in batches.items()}
        student_batch |= updates.draw_student(variant, shape, keys[-1])

        state, fake_metrics, sums = self.update_fake(variant, state, frozen, fixed, fake_batches, key)
        trained = fake_of(state.fake), state.critic

        def loss(student: Any, rows: Mapping[str, Array], key: PRNGKeyArray) -> tuple[Array, Sums]:
            return updates.student_loss(variant, state.step, trained, frozen, student_of(student), rows, key)

        (_, student_sums), grads = value_and_grad(loss, state.student, student_batch, key, self.config.accumulate)
        changes, student_opt = self.student_tx.update(grads, state.student_opt, state.student)
        student, average = optax.apply_updates(state.student, changes), state.average
        if average is not None:
            average = follow(average, student, state.step, self.config.average)
        metrics = gradient_metrics('student', optax.global_norm(grads), self.config.student.clip_norm)
        metrics |= fake_metrics | own | means(student_sums | sums, variant, self.examples.first_unit)
        return state.replace(student=student, student_opt=student_opt, average=average), metrics  # pyright: ignore[reportAttributeAccessIssue]

    def update_fake(
        self, stage: int, state: DMDState, frozen: Any, student: Any, batches: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[DMDState, dict[str, Array], Sums]:
        """Update fake model and critic on a fixed student, one batch per update; also return metrics and unit sums."""
        (_, fake_of), updates = self.trained.whole(frozen), self.updates

        def loss(trained: Any, rows: Mapping[str, Array], key: PRNGKeyArray) -> tuple[Array, Sums]:
            return updates.fake_loss(stage, state.step, student, (fake_of(trained[0]), trained[1]), rows, key)

        def update(carry: tuple[Any, Any], batch: Mapping[str, Array]) -> tuple[Any, Any]:
            trained, (fake_opt, critic_opt) = carry
            (_, sums), grads = value_and_grad(loss, trained, batch, key, self.config.accumulate)
            fake_changes, fake_opt = self.fake_tx.update(grads[0], fake_opt, trained[0])
            critic_changes, critic_opt = self.critic_tx.update(grads[1], critic_opt, trained[1])
            metrics = gradient_metrics('fake', optax.global_norm(grads[0]), self.config.fake.clip_norm)
            trained = optax.apply_updates(trained, (fake_changes, critic_changes))
            return (trained, (fake_opt, critic_opt)), (metrics, sums)

        carry = (state.fake, state.critic), (state.fake_opt, state.critic_opt)
        ((fake, critic), (fake_opt, critic_opt)), (metrics, sums) = jax.lax.scan(update, carry, batches)
        state = state.replace(fake=fake, critic=critic, fake_opt=fake_opt, critic_opt=critic_opt)  # pyright: ignore[reportAttributeAccessIssue]
        return state, jax.tree.map(jnp.mean, metrics), jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums)

    def batches(
        self,
        stage: int,
        step: Array,
        student: Any,
        batch: Mapping[str, Array],
        keys: PRNGKeyArray,
        own_key: PRNGKeyArray,
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the batches of an iteration with the examples' random numbers and own histories, and metrics.

        Args:
          step: number of earlier iterations.
          student: the student's parameters.
          keys: of the updates, [N].
        """
        starts = [start_name(stage) for stage in range(self.schedule.stages)] if self.config.pairs else []
        given = {name: batch[name] for name in ('latents', 'text', 'text_mask', 'pooled', *starts)}
        draw = lambda key: self.examples.draw(jax.random.split(key, 3)[0], stage, batch['latents'].shape[1:])
        draws = jax.vmap(draw)(keys)
        if not self.config.own_history.enabled:
            return given | draws, {}
        denoise = self.updates.denoiser(student)
        given = self.own_histories.attach(denoise, step, stage, given, draws['unit'], draws['index'], own_key)
        return given | draws, {'own_history': jnp.mean(given['own'], dtype=jnp.float32)}

    def evaluate(self, state: DMDState, frozen: Any, folder: pathlib.Path) -> dict[str, float]:
        """Write the averaged student's videos; return their comparison with the teacher's."""
        if self.evaluation is None:
            raise InputError('config.loop.evaluate_every is set: set config.dmd.evaluation.videos, too.')
        student = self.trained.whole_student(state.result, frozen)
        return self.evaluation(student, frozen['teacher'], int(to_host(state.step)), folder)

    def finish(self, state: DMDState, folder: pathlib.Path) -> None:
        """Write the student, its adapter and `student.json` in the released layout.

        If averaging is on, the student is the average; the student without it goes to the folder `not_averaged`.
        """
        students = {'': state.result} if state.average is None else {'': state.average, NOT_AVERAGED: state.student}
        students, step = to_host((students, state.step))
        if jax.process_index() != 0:
            return
        assert self.adapter is not None  # only a program without weights has none
        record = self.metadata() | {'iterations': int(step), 'checkpoint': str(self.config.checkpoint)}
        student_of, _ = self.trained.whole(self.frozen())
        whole = {name: student_of(student) for name, student in students.items()}
        write_students(folder, self.module, whole, self.adapter, record)

    def metadata(self) -> dict[str, Any]:
        """Return the identity of the distillation: teacher, protocol and objective, but not learning rates."""
        settings = dataclasses.asdict(self.config).items()
        config = {name: value for name, value in settings if name not in NOT_IN_IDENTITY}
        record = config | self.trained.start.identity() | {'spacing': self.schedule.spacing, 'frames': self.frames}
        record |= {'teacher': self.fingerprint, 'samples': self.samples}
        return as_json(record)


def _plain(program: DMD) -> DMD:
    """Return a distillation without recomputation and padding, itself if it has none."""
    module = plain_denoiser(program.module)
    if module == program.module and program.config.accumulate == 1:
        return program
    plain = copy.copy(program)
    plain.config = dataclasses.replace(program.config, remat='none', attention=module.attention, accumulate=1)
    plain.module, plain.teacher_module = module, plain_denoiser(program.teacher_module)
    plain.critic = program.critic and dataclasses.replace(program.critic, module=module)
    return plain
