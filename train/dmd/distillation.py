"""Pyramidal distribution matching as a program of the loop.

Legend: B batch, T latent frames (= units), H W full-size latent grid, h w the stage's, C channels, L text tokens,
D width, N updates in an iteration.
Source: Neodragon, arXiv 2511.06055, section on step distillation.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import as_json
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.folders import STUDENT, STUDENT_ADAPTER
from neodragon_jax.pyramid.sampler import Prompt
from neodragon_jax.pyramid.schedule import Schedule
from train.data import DTYPES
from train.dmd.config import PROTOCOLS, DMDConfig
from train.dmd.critic import FeatureCritic
from train.dmd.evaluation import StudentEvaluation, checkpoint_decoder
from train.dmd.examples import Examples
from train.dmd.metrics import Sums, gradient_metrics, means
from train.dmd.own_history import OwnHistories
from train.dmd.rollout import Rollout
from train.dmd.state import DMDState, follow
from train.dmd.teacher import MultiStepTeacher, read_teacher
from train.dmd.updates import Updates
from train.flow import flow_matching
from train.runtime.gradients import value_and_grad
from train.runtime.optimizer import make_optimizer
from train.runtime.platform import attention_on_platform
from train.runtime.sharding import to_host

# Folded into a step's key for the random numbers of roll-outs.
OWN_HISTORY = 2**30
# Subfolder of the result with the student without averaging.
NOT_AVERAGED = 'not_averaged'


class DMD:
    """The step distillation as a program of the loop.

    One step is compiled per stage; it holds every unit (the envelope). The alternative, a packed sequence of all three
    stages, gives the same numbers in 1.9 (width 768, 2 blocks) to 2.3 times (width 128, 4 blocks) the time per sample
    and with 2.2 times the attention scores, most of them masked (`python -m train.measure.packing --width 128
    --blocks 4`, on a CPU with two cores).
    """

    name = 'dmd'

    def __init__(
        self,
        config: DMDConfig,
        negative: Mapping[str, Any],
        frames: int,
        teacher: MultiStepTeacher | None = None,
        samples: Mapping[str, Any] | None = None,
        held_out: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the program.

        Args:
          negative: conditioning of the negative prompt, for guidance: text [L, D], text_mask [L],
            pooled [p].
          frames: T of the training samples.
          teacher: the teacher; by default it is read from `config.checkpoint`.
          samples: JSON that describes the samples; a resumed run must have the same.
          held_out: samples to evaluate on, with a leading axis; None for no evaluation.
        Raises:
          InputError: the checkpoint cannot be read, or does not fit the samples.
        """
        teacher = read_teacher(config.checkpoint, config.teacher) if teacher is None else teacher
        if negative['text'].shape[-1] != teacher.module.config.width:
            raise InputError(
                f'the text states of the samples are {negative["text"].shape[-1]} wide, the denoiser takes '
                f'{teacher.module.config.width}: make the samples with the checkpoint that is distilled.'
            )
        self.config, self.schedule, self.frames = config, Schedule(spacing='even'), frames
        first_unit = PROTOCOLS[config.protocol]
        if frames <= first_unit:
            raise InputError(f'protocol {config.protocol} needs more than {first_unit} latent frames per sample.')
        self.fingerprint, self.adapter, self.teacher = teacher.fingerprint, teacher.adapter, teacher.params
        self.samples = dict(samples or {})
        attention = attention_on_platform(config.attention)
        options = {'dtype': DTYPES[config.dtype], 'remat': config.remat, 'attention': attention}
        self.module = teacher.module.clone(scan=True, **options)
        self.negative = Prompt(*(negative[name] for name in ('text', 'text_mask', 'pooled')))  # pyright: ignore[reportArgumentType]
        self.student_tx, self.fake_tx = make_optimizer(config.student), make_optimizer(config.fake)
        self.critic_tx = make_optimizer(config.fake, fixed=())
        adversarial = config.objectives.adversarial
        self.critic = FeatureCritic(adversarial, self.module) if adversarial.used else None
        steps = config.student_steps, config.student_first_steps
        self.examples = Examples(
            frames,
            first_unit,
            *steps,
            self.schedule,
            clean_prediction=config.clean_prediction,
            unit_weights=config.unit_weights,
            with_data=config.input == 'samples',
            uniform_levels=config.levels == 'uniform',
        )
        rollout = Rollout(frames, *steps, self.schedule)
        self.own_histories = OwnHistories(config.own_history, rollout, first_unit)

        self.evaluation = None
        if held_out is not None:
            apply: Any = self.module.apply
            decode = checkpoint_decoder(config.checkpoint)
            self.evaluation = StudentEvaluation(config.evaluation, self.examples, apply, held_out, decode)

    @property
    def updates(self) -> Updates:
        """The losses of both models."""
        config = self.config
        apply: Any = self.module.apply
        guidance = config.guidance, config.first_guidance
        return Updates(apply, self.examples, config.objectives.parts(), *guidance, self.critic)

    def frozen(self) -> dict[str, Any]:
        """Return the teacher's parameters and its negative prompt."""
        return {'teacher': self.teacher, 'negative': self.negative}

    def init_state(self, key: PRNGKeyArray, frozen: Any) -> DMDState:
        """Return both models as copies of the teacher, with fresh optimizers."""
        state = DMDState.begin(frozen['teacher'], self.student_tx, self.fake_tx)
        critic = {} if self.critic is None else self.critic.init(key)
        average = jax.tree.map(jnp.copy, state.student) if self.config.average.decay else None
        return state.replace(critic=critic, critic_opt=self.critic_tx.init(critic), average=average)  # pyright: ignore[reportAttributeAccessIssue]

    def variant(self, step: int) -> int:
        """Return the stage of a step."""
        weights = self.config.stage_weights
        return flow_matching.stage_of_step(self.config.seed, step, self.schedule.stages, weights)

    def train_step(
        self, variant: int, state: DMDState, frozen: Any, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[DMDState, dict[str, Array]]:
        """Run one iteration at stage `variant`: the fake model's updates, then the student's.

        Args:
          batch: latents [N, B, T, H, W, C], text [N, B, L, D], text_mask [N, B, L], pooled [N, B, p].
        """
        keys, updates = jax.random.split(key, self.config.updates), self.updates
        batches, own = self.batches(variant, state, batch, keys, jax.random.fold_in(key, OWN_HISTORY))
        shape = batch['latents'].shape[1:]
        fake_batches = {name: array[:-1] for name, array in batches.items()}
        fake_batches |= jax.vmap(functools.partial(updates.draw_fake, variant, shape))(keys[:-1])
        student_batch = {name: array[-1] for name, array in batches.items()}
        student_batch |= updates.draw_student(variant, shape, keys[-1])

        state, fake_metrics, sums = self.update_fake(variant, state, fake_batches, key)
        loss = functools.partial(updates.student_loss, variant, state.step, (state.fake, state.critic), frozen)
        (_, student_sums), grads = value_and_grad(loss, state.student, student_batch, key, self.config.accumulate)
        changes, student_opt = self.student_tx.update(grads, state.student_opt, state.student)
        student, average = optax.apply_updates(state.student, changes), state.average
        if average is not None:
            average = follow(average, student, state.step, self.config.average)
        metrics = gradient_metrics('student', optax.global_norm(grads), self.config.student.clip_norm)
        metrics |= fake_metrics | own | means(student_sums | sums, variant, self.examples.first_unit)
        return state.replace(student=student, student_opt=student_opt, average=average), metrics  # pyright: ignore[reportAttributeAccessIssue]

    def update_fake(
        self, stage: int, state: DMDState, batches: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[DMDState, dict[str, Array], Sums]:
        """Update the fake model and the critic, one batch per update; also return metrics and unit sums."""
        loss = functools.partial(self.updates.fake_loss, stage, state.step, state.student)

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
        self, stage: int, state: DMDState, batch: Mapping[str, Array], keys: PRNGKeyArray, own_key: PRNGKeyArray
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the batches of an iteration with the examples' random numbers and own histories, and metrics.

        Args:
          keys: of the updates, [N].
        """
        given = {name: batch[name] for name in ('latents', 'text', 'text_mask', 'pooled')}
        draw = lambda key: self.examples.draw(jax.random.split(key, 3)[0], stage, batch['latents'].shape[1:])
        draws = jax.vmap(draw)(keys)
        if not self.config.own_history.enabled:
            return given | draws, {}
        student = self.updates.denoiser(state.student)
        given = self.own_histories.attach(student, state.step, stage, given, draws['unit'], draws['index'], own_key)
        return given | draws, {'own_history': jnp.mean(given['own'], dtype=jnp.float32)}

    def evaluate(self, state: DMDState, frozen: Any, folder: pathlib.Path) -> dict[str, float]:
        """Write the averaged student's videos; return their comparison with the teacher's."""
        del frozen
        if self.evaluation is None:
            raise InputError('config.loop.evaluate_every is set: set config.dmd.evaluation.videos, too.')
        return self.evaluation(state.result, int(to_host(state.step)), folder)

    def finish(self, state: DMDState, folder: pathlib.Path) -> None:
        """Write the student, its adapter and `student.json` in the released layout.

        If averaging is on, the student is the average; the student without it goes to the folder `not_averaged`.
        """
        students, step = to_host(({'': state.result, NOT_AVERAGED: state.student}, state.step))
        if jax.process_index() != 0:
            return
        assert self.adapter is not None  # only a program without weights has none
        record = self.metadata() | {'iterations': int(step), 'checkpoint': str(self.config.checkpoint)}
        for name, student in students.items():
            if name and state.average is None:
                continue
            checkpoint.save(folder / name / STUDENT, self.module, student)
            checkpoint.save(folder / name / STUDENT_ADAPTER, *self.adapter)
            with atomic_file(folder / name / 'student.json') as path:
                path.write_text(json.dumps(record | {'averaged': bool(not name and state.average)}, indent=2) + '\n')

    def metadata(self) -> dict[str, Any]:
        """Return the identity of the distillation: teacher, protocol and objective, but not learning rates."""
        config = dataclasses.asdict(self.config)
        for name in ('checkpoint', 'dtype', 'remat', 'attention', 'accumulate', 'evaluation', 'student', 'fake'):
            del config[name]
        record = config | {'spacing': self.schedule.spacing, 'frames': self.frames}
        record |= {'teacher': self.fingerprint, 'samples': self.samples}
        return as_json(record)
