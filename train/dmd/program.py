"""Pyramidal distribution matching: distils a multi-step denoiser into one with few steps per stage.

    python -m train.dmd --config=configs/dmd.py:tiny --config.data=FOLDER --config.workdir=DIR

Three copies of the multi-step denoiser: the frozen *teacher* D, guided; the *student* D_theta, which becomes the
few-step model; the *fake* model D_phi, which follows the student's output distribution. One iteration is
`fake_updates` updates of the fake model, then one of the student:

    x        = the data's noisy latent at a stage, at one of the student's own levels (1 for 1-1-1)
    z_theta  = clean_prediction(x, D_theta(x))
    y0, y1   = stage_pair(z_theta, fresh noise); z_tau between them
    fake:      || D_phi(z_tau) - (y0 - y1) ||^2, z_theta detached, tau ~ U(0, 1)
    student:   gradient w (D(z_tau) - D_phi(z_tau)) on z_theta, plus 0.5 log(1 + ||z_theta - z||^2)

The history before x is the data's, or in a share of the examples the student's own (`rollout.py`).

Source: ND = Neodragon, arXiv 2511.06055, section on step distillation; formulas are in losses.py.
Legend: B batch, T latent frames (= units), H W full-size latent grid, h w the stage's, C channels, L text tokens,
D width, N updates in an iteration.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.checkpoint.folders import STUDENT, STUDENT_ADAPTER, TEACHER_ADAPTER
from neodragon_jax.pyramid.sampler import Denoiser, Prompt, Unit, guided, jax_denoiser
from neodragon_jax.pyramid.schedule import Schedule
from neodragon_jax.pyramid.stages import envelope_history, levels, stage_pair
from train.aot.abstract import AbstractProgram
from train.data import DTYPES, SampleSource
from train.data.sources import Repeated
from train.dmd.config import PROTOCOLS, DMDConfig
from train.dmd.examples import Example, Probe, by_unit, prompt_of, student_metrics
from train.dmd.rollout import Rollout, drawn_noise
from train.dmd.teacher import Teacher, abstract_teacher, read_teacher
from train.flow import flow_matching, losses
from train.runtime import loop
from train.runtime.optimizer import make_optimizer
from train.runtime.processes import start_processes
from train.runtime.settings import freeze, require
from train.runtime.sharding import to_host
from train.teacher_samples import scale_by_unit

# Released folder names of what comes out.

# Numbers of further random keys, beside those that a step with the data's history splits: they stay as they are.
OWN_HISTORY, OWN_INPUT = 2**30, 2**30 + 1


@flax.struct.dataclass
class DMDState:
    """What is trained: both models in float32, stacked for the scan, and their optimizers."""

    step: Array
    student: Any
    fake: Any
    student_opt: Any
    fake_opt: Any


class DMD:
    """The step distillation as a program of the loop.

    One step is compiled per stage; it holds every unit (the envelope). The alternative, a packed sequence of all three
    stages, gives the same numbers in 1.9 (width 768, 2 blocks) to 2.3 times (width 128, 4 blocks) the time per sample
    and with 2.2 times the attention scores, most of them masked (`python -m train.measure.packing --width 128
    --blocks 4`, on a CPU with two cores).
    """

    name = 'dmd'

    def __init__(
        self, config: DMDConfig, negative: Mapping[str, Any], frames: int, teacher: Teacher | None = None
    ) -> None:
        """Make the program.

        Args:
          negative: what the teacher is guided away from, of one prompt: text [L, D], text_mask [L], pooled [p].
          frames: T of the training samples.
          teacher: by default it is read from `config.checkpoint`.
        Raises:
          InputError: the checkpoint cannot be read, or does not fit the samples.
        """
        teacher = read_teacher(config.checkpoint) if teacher is None else teacher
        if negative['text'].shape[-1] != teacher.module.config.width:
            raise InputError(
                f'the text states of the samples are {negative["text"].shape[-1]} wide, the denoiser takes '
                f'{teacher.module.config.width}: make the samples with the checkpoint that is distilled.'
            )
        self.config, self.schedule, self.frames = config, Schedule(), frames
        self.first_unit = PROTOCOLS[config.protocol]
        if frames <= self.first_unit:
            raise InputError(f'protocol {config.protocol} needs more than {self.first_unit} latent frames per sample.')
        self.fingerprint, self.adapter, self.teacher = teacher.fingerprint, teacher.adapter, teacher.params
        options = {'dtype': DTYPES[config.dtype], 'remat': config.remat, 'attention': config.attention}
        self.module = teacher.module.clone(scan=True, **options)
        self.negative = Prompt(*(negative[name] for name in ('text', 'text_mask', 'pooled')))  # pyright: ignore[reportArgumentType]
        self.student_tx, self.fake_tx = make_optimizer(config.student), make_optimizer(config.fake)
        self.rollout = Rollout(frames, config.student_steps, self.schedule)

    def frozen(self) -> dict[str, Any]:
        """Return the teacher and what it is guided away from."""
        return {'teacher': self.teacher, 'negative': self.negative}

    def init_state(self, key: PRNGKeyArray, frozen: Any) -> DMDState:
        """Return both models as copies of the teacher (ND: same initialization), with fresh optimizers."""
        del key
        # Real copies: the state's buffers are donated to every step, the teacher's must survive.
        student, fake = (jax.tree.map(jnp.copy, frozen['teacher']) for _ in range(2))
        return DMDState(
            step=jnp.zeros((), jnp.int32),
            student=student,
            fake=fake,
            student_opt=self.student_tx.init(student),
            fake_opt=self.fake_tx.init(fake),
        )

    def variant(self, step: int) -> int:
        """Return the stage of a step."""
        return flow_matching.stage_of_step(self.config.seed, step, self.schedule.stages)

    def train_step(
        self, variant: int, state: DMDState, frozen: Any, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[DMDState, dict[str, Array]]:
        """Run one iteration at stage `variant`: the fake model's updates, then the student's.

        Args:
          batch: latents [N, B, T, H, W, C], text [N, B, L, D], text_mask [N, B, L], pooled [N, B, p].
        """
        keys = jax.random.split(key, self.config.updates)
        batch = {name: batch[name] for name in ('latents', 'text', 'text_mask', 'pooled')}
        own_metrics = {}
        if self.config.own_history.ever:
            own_keys = jax.random.split(jax.random.fold_in(key, OWN_HISTORY), self.config.updates)
            generate = functools.partial(self.own_histories, state.student, state.step)
            batch |= jax.lax.map(lambda inputs: generate(*inputs), (batch, own_keys))
            own_metrics['own_history'] = jnp.mean(batch['own'], dtype=jnp.float32)
        fake_batches = {name: array[:-1] for name, array in batch.items()}
        student_batch = {name: array[-1] for name, array in batch.items()}

        def update_fake(carry: tuple[Any, Any], inputs: tuple[Any, PRNGKeyArray]) -> tuple[Any, Any]:
            fake, opt = carry
            fake_loss = jax.value_and_grad(self.fake_loss, has_aux=True)
            (loss, sums), grads = fake_loss(fake, state.student, variant, *inputs)
            changes, opt = self.fake_tx.update(grads, opt, fake)
            metrics = {'fake_mse': loss, 'fake_grad_norm': optax.global_norm(grads)}
            return (optax.apply_updates(fake, changes), opt), (metrics, sums)

        (fake, fake_opt), (fake_metrics, fake_sums) = jax.lax.scan(
            update_fake, (state.fake, state.fake_opt), (fake_batches, keys[:-1])
        )
        grads, metrics = jax.grad(self.student_loss, has_aux=True)(
            state.student, fake, frozen, variant, student_batch, keys[-1]
        )
        changes, student_opt = self.student_tx.update(grads, state.student_opt, state.student)
        metrics |= {'student_grad_norm': optax.global_norm(grads)} | jax.tree.map(jnp.mean, fake_metrics)
        metrics |= own_metrics | by_unit('fake_mse', jnp.sum(fake_sums, axis=0), variant, self.first_unit)
        state = state.replace(  # pyright: ignore[reportAttributeAccessIssue]
            student=optax.apply_updates(state.student, changes), student_opt=student_opt, fake=fake, fake_opt=fake_opt
        )
        return state, metrics

    def fake_loss(
        self, fake: Any, student: Any, stage: int, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[Float[Array, ''], Float[Array, '2 T']]:
        """Return the flow matching loss of the fake model on the student's detached prediction, and its unit sums."""
        example_key, tau_key, noise_key = jax.random.split(key, 3)
        example, z_theta = self.predict(student, stage, batch, example_key)
        tau = jax.random.uniform(tau_key, example.unit.shape)
        probe = self.probe(z_theta, stage, tau, noise_key)
        flow = example.ask(self._denoiser(fake), stage, probe.x, probe.timestep)
        errors = losses.squared_error(flow, probe.flow)
        return jnp.mean(errors), flow_matching.unit_sums(errors, example.unit, self.frames)

    def student_loss(
        self, student: Any, fake: Any, frozen: Any, stage: int, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[Float[Array, ''], dict[str, Array]]:
        """Return the student's surrogate, whose value means nothing but whose gradient counts, and metrics."""
        example_key, tau_key, noise_key = jax.random.split(key, 3)
        example, z_theta = self.predict(student, stage, batch, example_key)
        tau = jax.random.choice(tau_key, jnp.asarray(self.config.student_taus, jnp.float32), example.unit.shape)
        probe = self.probe(z_theta, stage, tau, noise_key)
        scale = scale_by_unit(self.config.guidance, self.config.first_guidance)
        teacher = guided(self._denoiser(frozen['teacher']), frozen['negative'], scale)
        teacher_flow = jax.lax.stop_gradient(example.ask(teacher, stage, probe.x, probe.timestep))
        fake_flow = jax.lax.stop_gradient(example.ask(self._denoiser(fake), stage, probe.x, probe.timestep))
        weight = losses.probe_weight(teacher_flow, probe.flow)
        cauchy = losses.cauchy(z_theta, example.clean)
        matching = losses.distribution_matching(z_theta, teacher_flow, fake_flow, weight)
        loss = self.config.distribution_weight * matching + self.config.cauchy_weight * jnp.mean(cauchy)

        values = {
            'endpoint_mse': losses.squared_error(z_theta, example.clean),
            'cauchy': cauchy,
            'teacher_error': losses.squared_error(teacher_flow, probe.flow),
            'direction_square': losses.squared_error(teacher_flow, fake_flow),
            'weight': weight,
        }
        return loss, student_metrics(values, example.unit, stage, self.frames, self.first_unit)

    def predict(self, student: Any, stage: int, batch: Mapping[str, Array], key: PRNGKeyArray) -> tuple[Example, Unit]:
        """Draw a unit and a level per example, and return the example with the student's clean prediction z_theta."""
        unit_key, level_key, noise_key = jax.random.split(key, 3)
        example = self.example(stage, batch, unit_key)
        starts = jnp.asarray(self.schedule.steps(stage, self.config.student_steps).levels[:-1], jnp.float32)
        level = jax.random.choice(level_key, starts, example.unit.shape)
        start, end = stage_pair(example.clean, _normal_like(noise_key, example.clean), stage, self.schedule)
        x = losses.interpolate(start, end, level)
        if 'own' in batch and self.config.own_history.arrive:
            own_x = self._own_input(student, stage, batch, example, level, jax.random.fold_in(key, OWN_INPUT))
            x = jnp.where(losses.per_sample(batch['own'], x) > 0, own_x, x)
        flow = example.ask(self._denoiser(student), stage, x, self.schedule.timestep(stage, level))
        return example, losses.clean_prediction(x, flow, level, stage, self.schedule, self.config.clean_prediction)

    def example(self, stage: int, batch: Mapping[str, Array], key: PRNGKeyArray) -> Example:
        """Draw a unit per sample, and lay out its history: clean frames of the teacher's sample, or the student's."""
        latents = batch['latents'].astype(jnp.float32)
        rows = jnp.arange(latents.shape[0])
        unit = jax.random.randint(key, rows.shape, self.first_unit, self.frames)
        pyramid = levels(latents, self.schedule.stages)
        past = levels(batch['history'], self.schedule.stages) if 'history' in batch else pyramid
        return Example(
            unit=unit,
            history=envelope_history(past, unit, stage, self.frames - 1),
            clean=pyramid[stage][rows, unit][:, None],
            prompt=prompt_of(batch),
        )

    def own_histories(
        self, student: Any, step: Int[Array, ''], batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> dict[str, Array]:
        """Draw which examples stand behind the student's own frames; return that and all histories.

        Returns:
          own [B]; history [B, T, H, W, C]. Where no example is drawn, nothing is generated.
        """
        own_key, noise_key = jax.random.split(key)
        latents = batch['latents'].astype(jnp.float32)
        own = jax.random.bernoulli(own_key, self.config.own_history.share(step), latents.shape[:1])
        noise = drawn_noise(noise_key, len(latents), self.schedule)
        denoise = self._denoiser(student)
        generate = lambda: self.rollout.videos(denoise, prompt_of(batch), latents, self.first_unit, noise)
        generated = jax.lax.cond(jnp.any(own), generate, lambda: latents)
        return {'own': own, 'history': jnp.where(losses.per_sample(own, latents) > 0, generated, latents)}

    def _own_input(
        self,
        student: Any,
        stage: int,
        batch: Mapping[str, Array],
        example: Example,
        level: Float[Array, ' B'],
        key: PRNGKeyArray,
    ) -> Unit:
        """Return x at each example's level as the student's own earlier steps of the unit leave it; no gradient."""
        noise = drawn_noise(key, len(level), self.schedule)
        denoise = self._denoiser(jax.lax.stop_gradient(student))
        starts = jnp.asarray(self.schedule.steps(stage, self.config.student_steps).levels[:-1], jnp.float32)
        index = jnp.argmin(jnp.abs(starts - level[:, None]), axis=1)

        def generate() -> Unit:
            history = batch['history']
            inputs = self.rollout.inputs(denoise, example.prompt, history, example.unit, stage, noise)
            return jnp.stack(inputs)[index, jnp.arange(len(level))]

        return jax.lax.cond(jnp.any(batch['own']), generate, lambda: jnp.zeros_like(example.clean))

    def probe(self, z_theta: Unit, stage: int, tau: Float[Array, ' B'], key: PRNGKeyArray) -> Probe:
        """Re-noise a detached prediction as a new pair of the stage, and return its point at level tau."""
        z_theta = jax.lax.stop_gradient(z_theta)
        y0, y1 = stage_pair(z_theta, _normal_like(key, z_theta), stage, self.schedule)
        return Probe(losses.interpolate(y0, y1, tau), y0 - y1, self.schedule.timestep(stage, tau))

    def _denoiser(self, params: Any) -> Denoiser:
        """Return a copy as a function."""
        return jax_denoiser(self.module.apply, params)  # pyright: ignore[reportArgumentType]

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
        return config | {
            'student_taus': list(self.config.student_taus),
            'frames': self.frames,
            'teacher': self.fingerprint,
        }


def _normal_like(key: PRNGKeyArray, x: Array) -> Array:
    return jax.random.normal(key, x.shape, jnp.float32)


def load_program(config: DMDConfig, source: SampleSource) -> DMD:
    """Return the program for a folder of teacher samples.

    Raises:
      InputError: the samples have no text states, or were made with another checkpoint's.
    """
    adapter = fingerprint(checkpoint.component_folder(config.checkpoint, TEACHER_ADAPTER))
    made_by = source.protocol.get('adapter')  # not every text state is one's, and not every sample has text states
    if made_by != adapter:
        given = f'come from the context adapter {made_by}' if made_by else 'come from no context adapter'
        raise InputError(
            f"the samples' text states {given}, the checkpoint {config.checkpoint} has {adapter}; use the checkpoint "
            'that made them, or make them again with train.teacher_samples.'
        )
    return DMD(config, source.negative(), source.spec.latents[0])


def read_settings(settings: ConfigDict) -> tuple[DMDConfig, loop.LoopConfig, str]:
    """Return the objective, the run and the folder of the data from settings such as configs/dmd.py.

    Raises:
      InputError: a setting is unknown, missing or out of range.
    """
    require(settings, 'checkpoint', 'data', 'workdir')
    return *_configs(settings), str(settings['data'])


def _configs(settings: ConfigDict) -> tuple[DMDConfig, loop.LoopConfig]:
    """Return the objective and the run, whatever folders are given."""
    values = settings.to_dict()
    seeded = {'seed': values['seed']}
    config = freeze(DMDConfig, values['dmd'] | seeded | {'checkpoint': values['checkpoint']}, 'config.dmd')
    run = values['loop'] | seeded | {'workdir': values['workdir'], 'updates': config.updates}
    return config, freeze(loop.LoopConfig, run, 'config.loop')


def abstract_program(settings: ConfigDict) -> AbstractProgram:
    """Return the program for a plan or for sizing, see train/aot/abstract.py; `settings.shapes` stands for the data.

    Raises:
      InputError: a setting is unknown or out of range.
    """
    config, run = _configs(settings)
    teacher, shapes = abstract_teacher(config.checkpoint), settings.to_dict()['shapes']
    sizes, stored = teacher.module.config, DTYPES['bfloat16']
    sample = {
        'latents': np.zeros((shapes['frames'], shapes['height'], shapes['width'], sizes.in_channels), stored),
        'text': np.zeros((shapes['text_tokens'], sizes.width), stored),
        'text_mask': np.zeros(shapes['text_tokens'], np.int32),
        'pooled': np.zeros(sizes.pooled_projection_dim, stored),
    }
    abstract = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in sample.items()}
    return AbstractProgram(DMD(config, abstract, shapes['frames'], teacher), Repeated(sample, 2**20), run)


def main(settings: ConfigDict, dry_run: bool = False) -> None:
    """Distil as the settings say, or print the plan of it; a plan needs no data.

    Raises:
      InputError: a setting is wrong or does not fit the data.
    """
    if dry_run and not settings['data']:
        print(loop.plan(*abstract_program(settings)))
        return
    config, run, data = read_settings(settings)
    start_processes(run.distributed)
    source = SampleSource(data)
    program = load_program(config, source)
    if dry_run:
        print(loop.plan(program, source, run))
    else:
        loop.run(program, source, run)
