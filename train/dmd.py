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

Source: ND = Neodragon, arXiv 2511.06055, section on step distillation; formulas are in losses.py.
Legend: B batch, T latent frames (= units), H W full-size latent grid, h w the stage's, C channels, L text tokens,
D width, N updates in an iteration.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from configs import command_line, freeze
from neodragon_jax import checkpoint
from neodragon_jax.atomic import atomic_file
from neodragon_jax.errors import InputError
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.mmdit import REMAT_POLICIES, PyramidMMDiT, stack_blocks
from neodragon_jax.pyramid import envelope_history, levels, stage_pair
from neodragon_jax.sampler import Denoiser, Prompt, Unit, guided, jax_denoiser
from neodragon_jax.schedule import Schedule
from train import loop, losses
from train.data import DTYPES, SampleSource
from train.optimizer import OptimizerConfig, make_optimizer
from train.sharding import start_processes, to_host
from train.teacher_samples import TEACHER, TEACHER_ADAPTER, fingerprint, scale_by_unit

# Released folder names of what comes out.
STUDENT, STUDENT_ADAPTER = 'diffusion_transformer_320p', 'context_adapter'

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
      cauchy_weight: factor of the regression loss.
      dtype: compute type of the denoisers, 'float32' or 'bfloat16'; masters stay float32.
      remat: see `PyramidMMDiT`.
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
    cauchy_weight: float = 0.5
    dtype: str = 'bfloat16'
    remat: str = 'full'
    seed: int = 0
    student: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    fake: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        choices = {
            'protocol': PROTOCOLS,
            'clean_prediction': losses.CLEAN_PREDICTIONS,
            'dtype': DTYPES,
            'remat': ('none', *REMAT_POLICIES),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f'{name} is {getattr(self, name)!r}; use one of {", ".join(known)}.')
        for name in ('student_steps', 'fake_updates'):
            if getattr(self, name) < 1:
                raise InputError(f'{name} is {getattr(self, name)}; at least one is needed.')
        if not self.student_taus or not all(0 <= tau <= 1 for tau in self.student_taus):
            raise InputError(f'student_taus is {self.student_taus}; give at least one level in 0..1.')

    @property
    def updates(self) -> int:
        """N, the batches that one iteration reads."""
        return self.fake_updates + 1


@flax.struct.dataclass
class DMDState:
    """What is trained: both models in float32, stacked for the scan, and their optimizers."""

    step: Array
    student: Any
    fake: Any
    student_opt: Any
    fake_opt: Any


class Example(NamedTuple):
    """A batch of the student's tasks at one stage, each at its own unit."""

    unit: Int[Array, ' B']
    history: list[Unit]
    clean: Unit  # z at the stage's resolution
    prompt: Prompt

    def ask(self, denoise: Denoiser, stage: int, x: Unit, timestep: Float[Array, ' B']) -> Unit:
        """Return a denoiser's flow at x, in float32 whatever it is computed in."""
        return denoise(stage, self.history, x, self.unit, self.prompt, timestep).astype(jnp.float32)


class Probe(NamedTuple):
    """The re-noised student prediction z_tau, and the pair it lies on."""

    x: Unit
    flow: Unit  # y0 - y1
    timestep: Float[Array, ' B']


class DMD:
    """The step distillation as a program of the loop.

    One step is compiled per stage; it holds every unit (the envelope). The alternative, a packed sequence of all three
    stages, gives the same numbers in 1.9 (width 768, 2 blocks) to 2.3 times (width 128, 4 blocks) the time per sample
    and with 2.2 times the attention scores, most of them masked: `python -m train.packing --width 128 --blocks 4`, on a
    CPU with two cores.
    """

    name = 'dmd'

    def __init__(self, config: DMDConfig, negative: Mapping[str, np.ndarray], frames: int) -> None:
        """Read the teacher.

        Args:
          negative: what the teacher is guided away from, of one prompt: text [L, D], text_mask [L], pooled [p].
          frames: T of the training samples.
        Raises:
          InputError: the checkpoint cannot be read, or does not fit the samples.
        """
        module, params = checkpoint.load(checkpoint.component_folder(config.checkpoint, TEACHER))
        if not isinstance(module, PyramidMMDiT):
            raise InputError(f'{config.checkpoint}: {TEACHER} holds a {type(module).__name__}; copy the folder again.')
        adapter, adapter_params = checkpoint.load(checkpoint.component_folder(config.checkpoint, TEACHER_ADAPTER))
        assert isinstance(adapter, ContextAdapter)
        if negative['text'].shape[-1] != module.config.width:
            raise InputError(
                f'the text states of the samples are {negative["text"].shape[-1]} wide, the denoiser takes '
                f'{module.config.width}: make the samples with the checkpoint that is distilled.'
            )
        self.config, self.schedule, self.frames = config, Schedule(), frames
        self.first_unit = PROTOCOLS[config.protocol]
        if frames <= self.first_unit:
            raise InputError(f'protocol {config.protocol} needs more than {self.first_unit} latent frames per sample.')
        self.fingerprint = fingerprint(checkpoint.component_folder(config.checkpoint, TEACHER))
        self.module = module.clone(scan=True, dtype=DTYPES[config.dtype], remat=config.remat)
        self.adapter = adapter, adapter_params
        self.teacher = jax.tree.map(lambda a: np.asarray(a, np.float32), stack_blocks(params, module.config.num_layers))
        self.negative = Prompt(*(negative[name] for name in ('text', 'text_mask', 'pooled')))  # pyright: ignore[reportArgumentType]
        self.student_tx, self.fake_tx = make_optimizer(config.student), make_optimizer(config.fake)

    def frozen(self) -> dict[str, Any]:
        """Return the teacher and what it is guided away from."""
        return {'teacher': self.teacher, 'negative': self.negative}

    def init_state(self, key: PRNGKeyArray, frozen: Any) -> DMDState:
        """Return both models as copies of the teacher (ND: same initialisation), with fresh optimizers."""
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
        """Return the stage of a step: uniform, and the same on every machine, from a hash of seed and step."""
        digest = hashlib.blake2b(f'{self.config.seed}/{step}'.encode(), digest_size=8).digest()
        return int.from_bytes(digest, 'big') % self.schedule.stages

    def train_step(
        self, variant: int, state: DMDState, frozen: Any, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[DMDState, dict[str, Array]]:
        """Run one iteration at stage `variant`: the fake model's updates, then the student's.

        Args:
          batch: latents [N, B, T, H, W, C], text [N, B, L, D], text_mask [N, B, L], pooled [N, B, p].
        """
        keys = jax.random.split(key, self.config.updates)
        batch = {name: batch[name] for name in ('latents', 'text', 'text_mask', 'pooled')}
        fake_batches = {name: array[:-1] for name, array in batch.items()}
        student_batch = {name: array[-1] for name, array in batch.items()}

        def update_fake(carry: tuple[Any, Any], inputs: tuple[Any, PRNGKeyArray]) -> tuple[Any, dict[str, Array]]:
            fake, opt = carry
            loss, grads = jax.value_and_grad(self.fake_loss)(fake, state.student, variant, *inputs)
            changes, opt = self.fake_tx.update(grads, opt, fake)
            metrics = {'fake_mse': loss, 'fake_grad_norm': optax.global_norm(grads)}
            return (optax.apply_updates(fake, changes), opt), metrics

        (fake, fake_opt), fake_metrics = jax.lax.scan(
            update_fake, (state.fake, state.fake_opt), (fake_batches, keys[:-1])
        )
        grads, metrics = jax.grad(self.student_loss, has_aux=True)(
            state.student, fake, frozen, variant, student_batch, keys[-1]
        )
        changes, student_opt = self.student_tx.update(grads, state.student_opt, state.student)
        metrics |= {'student_grad_norm': optax.global_norm(grads)} | jax.tree.map(jnp.mean, fake_metrics)
        state = state.replace(  # pyright: ignore[reportAttributeAccessIssue]
            student=optax.apply_updates(state.student, changes), student_opt=student_opt, fake=fake, fake_opt=fake_opt
        )
        return state, metrics

    def fake_loss(
        self, fake: Any, student: Any, stage: int, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> Float[Array, '']:
        """Return the flow matching loss of the fake model on the student's detached prediction."""
        example_key, tau_key, noise_key = jax.random.split(key, 3)
        example, z_theta = self.predict(student, stage, batch, example_key)
        tau = jax.random.uniform(tau_key, example.unit.shape)
        probe = self.probe(z_theta, stage, tau, noise_key)
        flow = example.ask(self._denoiser(fake), stage, probe.x, probe.timestep)
        return jnp.mean(losses.squared_error(flow, probe.flow))

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
        loss = losses.distribution_matching(z_theta, teacher_flow, fake_flow, weight)
        loss += self.config.cauchy_weight * jnp.mean(cauchy)

        values = {
            'endpoint_mse': losses.squared_error(z_theta, example.clean),
            'cauchy': cauchy,
            'teacher_error': losses.squared_error(teacher_flow, probe.flow),
            'direction_square': losses.squared_error(teacher_flow, fake_flow),
            'weight': weight,
        }
        return loss, self._metrics(values, example.unit, stage)

    def predict(self, student: Any, stage: int, batch: Mapping[str, Array], key: PRNGKeyArray) -> tuple[Example, Unit]:
        """Draw a unit and a level per example, and return the example with the student's clean prediction z_theta."""
        unit_key, level_key, noise_key = jax.random.split(key, 3)
        example = self.example(stage, batch, unit_key)
        starts = jnp.asarray(self.schedule.steps(stage, self.config.student_steps).levels[:-1], jnp.float32)
        level = jax.random.choice(level_key, starts, example.unit.shape)
        start, end = stage_pair(example.clean, _normal_like(noise_key, example.clean), stage, self.schedule)
        x = losses.interpolate(start, end, level)
        flow = example.ask(self._denoiser(student), stage, x, self.schedule.timestep(stage, level))
        return example, losses.clean_prediction(x, flow, level, stage, self.schedule, self.config.clean_prediction)

    def example(self, stage: int, batch: Mapping[str, Array], key: PRNGKeyArray) -> Example:
        """Draw a unit per sample, and lay out its history: clean frames of the teacher's sample."""
        latents = batch['latents'].astype(jnp.float32)
        rows = jnp.arange(latents.shape[0])
        unit = jax.random.randint(key, rows.shape, self.first_unit, self.frames)
        pyramid = levels(latents, self.schedule.stages)
        return Example(
            unit=unit,
            history=envelope_history(pyramid, unit, stage, self.frames - 1),
            clean=pyramid[stage][rows, unit][:, None],
            prompt=Prompt(batch['text'], batch['text_mask'], batch['pooled']),
        )

    def probe(self, z_theta: Unit, stage: int, tau: Float[Array, ' B'], key: PRNGKeyArray) -> Probe:
        """Re-noise a detached prediction as a new pair of the stage, and return its point at level tau."""
        z_theta = jax.lax.stop_gradient(z_theta)
        y0, y1 = stage_pair(z_theta, _normal_like(key, z_theta), stage, self.schedule)
        return Probe(losses.interpolate(y0, y1, tau), y0 - y1, self.schedule.timestep(stage, tau))

    def _denoiser(self, params: Any) -> Denoiser:
        """Return a copy as a function."""
        return jax_denoiser(self.module.apply, params)  # pyright: ignore[reportArgumentType]

    def _metrics(self, values: dict[str, Float[Array, ' B']], unit: Int[Array, ' B'], stage: int) -> dict[str, Array]:
        """Return batch means, and the regression's per unit and stage (NaN where no example has the unit)."""
        metrics = {name: jnp.mean(value) for name, value in values.items()}
        metrics['direction_rms'] = jnp.sqrt(metrics.pop('direction_square'))
        for index in range(self.first_unit, self.frames):
            here = unit == index
            mean = jnp.sum(jnp.where(here, values['endpoint_mse'], 0)) / jnp.sum(here)
            metrics[f'endpoint_mse/stage{stage}/unit{index}'] = mean
        return metrics

    def finish(self, state: DMDState, folder: pathlib.Path) -> None:
        """Write the student and the adapter it was trained with in the released layout, and `student.json`."""
        student, step = to_host((state.student, state.step))
        if jax.process_index() != 0:
            return
        checkpoint.save(folder / STUDENT, self.module, student)
        checkpoint.save(folder / STUDENT_ADAPTER, *self.adapter)
        record = self.metadata() | {'iterations': int(step), 'checkpoint': str(self.config.checkpoint)}
        with atomic_file(folder / 'student.json') as path:
            path.write_text(json.dumps(record, indent=2) + '\n')

    def metadata(self) -> dict[str, Any]:
        """Return what makes two runs the same distillation: teacher, protocol and objective, but not learning rates."""
        config = dataclasses.asdict(self.config)
        for name in ('checkpoint', 'dtype', 'remat', 'student', 'fake'):
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
      InputError: the samples were made with another checkpoint's text states.
    """
    adapter = fingerprint(checkpoint.component_folder(config.checkpoint, TEACHER_ADAPTER))
    if source.protocol['adapter'] != adapter:
        raise InputError(
            f"the samples' text states come from the context adapter {source.protocol['adapter']}, the checkpoint "
            f'{config.checkpoint} has {adapter}; use the checkpoint that made them, or make them again.'
        )
    return DMD(config, source.negative(), source.spec.latents[0])


def read_settings(settings: ConfigDict) -> tuple[DMDConfig, loop.LoopConfig, str]:
    """Return the objective, the run and the folder of the data from settings such as configs/dmd.py.

    Raises:
      InputError: a setting is unknown, missing or out of range.
    """
    values = settings.to_dict()
    for name in ('checkpoint', 'data', 'workdir'):
        if not values[name]:
            raise InputError(f'config.{name} is empty; pass --config.{name}=FOLDER.')
    seeded = {'seed': values['seed']}
    config = freeze(DMDConfig, values['dmd'] | seeded | {'checkpoint': values['checkpoint']}, 'config.dmd')
    run = values['loop'] | seeded | {'workdir': values['workdir'], 'updates': config.updates}
    return config, freeze(loop.LoopConfig, run, 'config.loop'), values['data']


def main(settings: ConfigDict, dry_run: bool = False) -> None:
    """Distil as the settings say, or print the plan of it.

    Raises:
      InputError: a setting is wrong or does not fit the data.
    """
    config, run, data = read_settings(settings)
    start_processes(run.distributed)
    source = SampleSource(data)
    program = load_program(config, source)
    if dry_run:
        print(loop.plan(program, source, run))
    else:
        loop.run(program, source, run)


if __name__ == '__main__':
    command_line(main, 'configs/dmd.py')
