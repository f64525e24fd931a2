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
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.folders import STUDENT, STUDENT_ADAPTER
from neodragon_jax.pyramid.sampler import Prompt
from neodragon_jax.pyramid.schedule import Schedule
from train.data import DTYPES
from train.dmd.config import PROTOCOLS, DMDConfig
from train.dmd.examples import Examples
from train.dmd.metrics import Sums, gradient_metrics, means
from train.dmd.own_history import OwnHistories
from train.dmd.rollout import Rollout
from train.dmd.state import DMDState
from train.dmd.teacher import MultiStepTeacher, read_teacher
from train.dmd.updates import Updates
from train.flow import flow_matching
from train.runtime.optimizer import make_optimizer
from train.runtime.sharding import to_host

# Folded into a step's key for the random numbers of roll-outs.
OWN_HISTORY = 2**30


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
    ) -> None:
        """Make the program.

        Args:
          negative: the conditioning that guidance steers away from, of one prompt: text [L, D], text_mask [L],
            pooled [p].
          frames: T of the training samples.
          teacher: by default it is read from `config.checkpoint`.
          samples: JSON on the samples, on which a resumed run must agree.
        Raises:
          InputError: the checkpoint cannot be read, or does not fit the samples.
        """
        teacher = read_teacher(config.checkpoint) if teacher is None else teacher
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
        options = {'dtype': DTYPES[config.dtype], 'remat': config.remat, 'attention': config.attention}
        self.module = teacher.module.clone(scan=True, **options)
        self.negative = Prompt(*(negative[name] for name in ('text', 'text_mask', 'pooled')))  # pyright: ignore[reportArgumentType]
        self.student_tx, self.fake_tx = make_optimizer(config.student), make_optimizer(config.fake)
        steps = config.student_steps, config.student_first_steps
        self.examples = Examples(
            frames, first_unit, *steps, self.schedule, config.clean_prediction, config.unit_weights
        )
        rollout = Rollout(frames, *steps, self.schedule)
        self.own_histories = OwnHistories(config.own_history, rollout, first_unit)

    @property
    def updates(self) -> Updates:
        """The losses of both models."""
        config = self.config
        apply: Any = self.module.apply
        return Updates(apply, self.examples, config.objectives.parts(), config.guidance, config.first_guidance)

    def frozen(self) -> dict[str, Any]:
        """Return the teacher's parameters and its negative prompt."""
        return {'teacher': self.teacher, 'negative': self.negative}

    def init_state(self, key: PRNGKeyArray, frozen: Any) -> DMDState:
        """Return both models as copies of the teacher, with fresh optimizers."""
        del key
        return DMDState.begin(frozen['teacher'], self.student_tx, self.fake_tx)

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

        fake, fake_opt, fake_metrics, sums = self.update_fake(variant, state, fake_batches)
        loss = functools.partial(updates.student_loss, variant, state.step, fake, frozen)
        grads, student_sums = jax.grad(loss, has_aux=True)(state.student, student_batch)
        changes, student_opt = self.student_tx.update(grads, state.student_opt, state.student)
        metrics = gradient_metrics('student', optax.global_norm(grads), self.config.student.clip_norm)
        metrics |= fake_metrics | own | means(student_sums | sums, variant, self.examples.first_unit)
        state = state.replace(  # pyright: ignore[reportAttributeAccessIssue]
            student=optax.apply_updates(state.student, changes), student_opt=student_opt, fake=fake, fake_opt=fake_opt
        )
        return state, metrics

    def update_fake(
        self, stage: int, state: DMDState, batches: Mapping[str, Array]
    ) -> tuple[Any, Any, dict[str, Array], Sums]:
        """Run the fake model's updates, each on a batch of its own; return it, its optimizer, metrics and unit sums."""
        loss = functools.partial(self.updates.fake_loss, stage, state.student)

        def update(carry: tuple[Any, Any], batch: Mapping[str, Array]) -> tuple[Any, Any]:
            fake, opt = carry
            (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(fake, batch)
            changes, opt = self.fake_tx.update(grads, opt, fake)
            metrics = gradient_metrics('fake', optax.global_norm(grads), self.config.fake.clip_norm)
            return (optax.apply_updates(fake, changes), opt), (metrics, sums)

        (fake, opt), (metrics, sums) = jax.lax.scan(update, (state.fake, state.fake_opt), batches)
        return fake, opt, jax.tree.map(jnp.mean, metrics), jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums)

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
        if not self.config.own_history.ever:
            return given | draws, {}
        student = self.updates.denoiser(state.student)
        given = self.own_histories.attach(student, state.step, stage, given, draws['unit'], draws['index'], own_key)
        return given | draws, {'own_history': jnp.mean(given['own'], dtype=jnp.float32)}

    def finish(self, state: DMDState, folder: pathlib.Path) -> None:
        """Write the student and the adapter it was trained with in the released layout, and `student.json`."""
        student, step = to_host((state.student, state.step))
        if jax.process_index() != 0:
            return
        checkpoint.save(folder / STUDENT, self.module, student)
        assert self.adapter is not None  # only a program without weights has none
        checkpoint.save(folder / STUDENT_ADAPTER, *self.adapter)
        record = self.metadata() | {'iterations': int(step), 'checkpoint': str(self.config.checkpoint)}
        with atomic_file(folder / 'student.json') as path:
            path.write_text(json.dumps(record, indent=2) + '\n')

    def metadata(self) -> dict[str, Any]:
        """Return what makes two runs the same distillation: teacher, protocol and objective, but not learning rates."""
        config = dataclasses.asdict(self.config)
        for name in ('checkpoint', 'dtype', 'remat', 'attention', 'student', 'fake'):
            del config[name]
        record = config | {'frames': self.frames, 'teacher': self.fingerprint, 'samples': self.samples}
        return json.loads(json.dumps(record))  # tuples become lists, as they are after a restart
