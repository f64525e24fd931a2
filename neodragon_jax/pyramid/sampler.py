"""Generate the latents of a video: unit by unit, stage by stage, step by step.

The denoiser is passed in as a function, so that JAX models, ONNX sessions and phone graphs run under the same control
flow. All units of a stage have one static shape (the envelope), so each stage compiles once.

Legend: B batch, T latent frames (= units), H W full-size latent grid, h w a stage's grid, C channels, L text tokens,
D width. Source: arXiv 2410.05954, algorithm 1; arXiv 2511.06055, section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.on_mesh import jit_on_mesh
from neodragon_jax.pyramid.history import envelope_frame_ids, envelope_history
from neodragon_jax.pyramid.schedule import Schedule, euler_step
from neodragon_jax.pyramid.spacings import MAX_STEPS
from neodragon_jax.pyramid.stages import block_noise, down_noise, enter_stage, levels

# Number of the posterior's noise among a sample's draws; units and stages count from 1.
POSTERIOR = 2**30

Keys = Key[Array, ' B']
Latents = Float[Array, 'B T H W C']
Unit = Float[Array, 'B 1 h w C']
History = Sequence[Float[Array, 'B 1 _ _ C']]
Scale = float | Callable[[Array], Array]


class Prompt(NamedTuple):
    """Conditioning of the denoiser on a prompt."""

    text: Float[Array, 'B L D']  # states after the context adapter
    mask: Int[Array, 'B L']  # 1 for valid tokens
    pooled: Float[Array, 'B p']  # pooled vector of the two CLIP towers


@runtime_checkable
class Denoiser(Protocol):
    """Function that predicts the flow of the current unit."""

    def __call__(
        self,
        stage: int,
        history: History,
        x: Unit,
        unit: Int[Array, ' B'],
        prompt: Prompt,
        timestep: Float[Array, ' B'],
    ) -> Unit:
        """Return the flow of `x`, given T - 1 history frames in the stage's envelope, front-padded."""
        ...


@runtime_checkable
class NoiseSource(Protocol):
    """Source of the random numbers of a generation."""

    def initial(self, shape: tuple[int, ...]) -> Latents:
        """Return white noise for all units at full size."""
        ...

    def block(self, unit: int, stage: int, shape: tuple[int, ...]) -> Unit:
        """Return the block noise on entering a stage > 0 of a unit."""
        ...

    def posterior(self, shape: tuple[int, ...]) -> Unit:
        """Return white noise for the posterior sample of a given first frame."""
        ...


@dataclasses.dataclass(frozen=True)
class DrawnNoise:
    """Noise from one key per sample: a sample does not depend on the rest of its batch."""

    keys: Keys
    schedule: Schedule = Schedule()

    def initial(self, shape: tuple[int, ...]) -> Latents:
        return white_noise(fold_keys(self.keys, 0), shape[1:])

    def block(self, unit: int, stage: int, shape: tuple[int, ...]) -> Unit:
        keys = fold_keys(self.keys, 1 + unit * self.schedule.stages + stage)
        return _block_noise(keys, shape[1:], self.schedule.gamma)

    def posterior(self, shape: tuple[int, ...]) -> Unit:
        return white_noise(fold_keys(self.keys, POSTERIOR), shape[1:])


@jax.jit
def fold_keys(keys: Keys, data: int | Array) -> Keys:
    """Fold one number into each of [B] keys."""
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


@partial(jax.jit, static_argnums=1)
def white_noise(keys: Keys, shape: tuple[int, ...]) -> Array:
    """Draw standard normal noise of `shape` for each of [B] keys."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


@partial(jax.jit, static_argnums=(1, 2))
def _block_noise(keys: Keys, shape: tuple[int, ...], gamma: float) -> Array:
    return jax.vmap(lambda key: block_noise(key, shape, gamma))(keys)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Size, steps and guidance of a generation.

    Attributes:
      frames: T, latent frames; 1 + 8 (T - 1) video frames.
      height, width: full-size latent grid.
      channels: C.
      steps: denoiser steps per stage.
      first_steps: the same for unit 0.
      guidance: classifier-free guidance scale; None calls the denoiser on the prompt alone.
      first_guidance: the same for unit 0.
    """

    frames: int
    height: int
    width: int
    channels: int = 16
    steps: tuple[int, ...] = (1, 1, 1)
    first_steps: tuple[int, ...] = (1, 1, 1)
    guidance: float | None = None
    first_guidance: float | None = None
    schedule: Schedule = Schedule()

    def __post_init__(self) -> None:
        stages = self.schedule.stages
        if self.frames < 1:
            raise InputError(f'{self.frames} latent frames; at least one is needed.')
        for name in ('steps', 'first_steps'):
            count = getattr(self, name)
            if len(count) != stages or not all(1 <= number <= MAX_STEPS for number in count):
                raise InputError(
                    f'{name} is {" ".join(map(str, count))}; give {stages} numbers from 1 to {MAX_STEPS}, one per '
                    'stage.'
                )
        factor = 2 ** (stages - 1)
        if self.height % factor or self.width % factor:
            raise InputError(f'a latent grid of {self.height}x{self.width} cannot be halved {stages - 1} times.')

    def unit_steps(self, unit: int) -> tuple[int, ...]:
        """Return the steps per stage of a unit."""
        return self.first_steps if unit == 0 else self.steps

    def unit_guidance(self, unit: int) -> float | None:
        """Return the guidance scale of a unit."""
        return self.first_guidance if unit == 0 else self.guidance

    def steps_total(self, first_unit: int) -> int:
        """Return the number of Euler steps from a unit on."""
        return sum(sum(self.unit_steps(unit)) for unit in range(first_unit, self.frames))

    def calls(self, first_unit: int) -> int:
        """Return the number of denoiser evaluations (a guided step counts as two)."""
        return sum(
            sum(self.unit_steps(unit)) * (1 if self.unit_guidance(unit) is None else 2)
            for unit in range(first_unit, self.frames)
        )


def jax_denoiser(apply: Callable[..., Any], params: Any) -> Denoiser:
    """Return a compiled denoiser.

    Args:
      apply: `apply({'params': params}, clips, text, mask, pooled, timestep, frame_ids)`, a model's method.
      params: its parameters, or a function that returns them.
    """
    current = params if callable(params) else lambda: params

    @jit_on_mesh
    def flow(params: Any, history: History, x: Unit, unit: Array, prompt: Prompt, timestep: Array) -> Unit:
        frame_ids = envelope_frame_ids(unit, len(history))
        return apply({'params': params}, [*history, x], prompt.text, prompt.mask, prompt.pooled, timestep, frame_ids)

    def denoise(stage: int, history: History, x: Unit, unit: Array, prompt: Prompt, timestep: Array) -> Unit:
        del stage  # implied by the shapes
        return flow(current(), list(history), x, unit, prompt, timestep)

    return denoise


def guided(denoise: Denoiser, negative: Prompt, scale: Scale) -> Denoiser:
    """Return a denoiser with classifier-free guidance: negative + scale (positive - negative), in one doubled batch.

    A sample's negative and positive prompt are neighbors in the doubled batch. Two separate halves would require an
    exchange between the devices that share the batch.

    Args:
      negative: conditioning to steer away from; without a batch axis it holds for all samples.
      scale: a number, or a function that maps the units of the samples, [B], to one scale per sample.
    """

    def both(stage: int, history: History, x: Unit, unit: Array, prompt: Prompt, timestep: Array) -> Unit:
        null = jax.tree.map(lambda n, p: jnp.broadcast_to(n, p.shape), negative, prompt)
        given = list(history), x, unit
        doubled = neighbors((*given, null, timestep), (*given, prompt, timestep))
        return guide(denoise(stage, *doubled), scale(unit) if callable(scale) else scale)

    return both


def neighbors(first: Any, second: Any, axis: int = 0) -> Any:
    """Return two trees of arrays as one of the doubled batch, in which each sample's two rows are neighbors."""

    def join(one: Array | np.ndarray, other: Array | np.ndarray) -> Array:
        shape = other.shape
        return jnp.stack([one, other], axis=axis + 1).reshape(*shape[:axis], -1, *shape[axis + 1 :])

    return jax.tree.map(join, first, second)


def guide(flow: Float[Array, 'N 1 h w C'], scale: float | Array) -> Float[Array, 'B 1 h w C']:
    """Return negative + scale (positive - negative) of the flows of a doubled batch, in float32.

    Args:
      flow: N = 2 B; a sample's flow with the negative prompt is followed by that with the positive prompt.
      scale: a number, or one per sample.
    """
    flow = flow.reshape(-1, 2, *flow.shape[1:]).astype(jnp.float32)
    factor = jnp.asarray(scale, jnp.float32).reshape(-1, 1, 1, 1, 1)
    return flow[:, 0] + factor * (flow[:, 1] - flow[:, 0])


def euler_steps(
    denoise: Denoiser,
    schedule: Schedule,
    stage: int,
    count: int,
    history: History,
    x: Unit,
    unit: Int[Array, ' B'],
    prompt: Prompt,
) -> Iterator[Unit]:
    """Yield x after each of the `count` Euler steps of a stage, from x at its start."""
    timesteps, local = schedule.steps(stage, count)
    for step, timestep in enumerate(timesteps):
        flow = denoise(stage, history, x, unit, prompt, jnp.full(unit.shape, timestep, jnp.float32))
        x = euler_step(x, flow, local[step], local[step + 1])
        yield x


def sample(
    denoise: Denoiser,
    plan: Plan,
    prompt: Prompt,
    noise: NoiseSource,
    negative: Prompt | None = None,
    first_frame: Unit | None = None,
    on_step: Callable[[int, int, int, Unit], object] = lambda unit, stage, step, x: None,
) -> Latents:
    """Generate the normalized latents of a batch of videos, [B, T, H, W, C].

    Args:
      denoise: see Denoiser.
      prompt: conditioning of the prompts.
      negative: conditioning that guidance steers away from; needed with guidance.
      noise: source of all random numbers.
      first_frame: normalized latent of a given first frame, [B, 1, H, W, C]; generation then starts at unit 1.
      on_step: called after every Euler step with (unit, stage, step, x), for progress and tests.
    Raises:
      InputError: guidance without a negative prompt.
    """
    first_unit = 0 if first_frame is None else 1
    stages, batch = plan.schedule.stages, prompt.text.shape[0]
    if negative is None and any(plan.unit_guidance(unit) is not None for unit in range(first_unit, plan.frames)):
        raise InputError('guidance needs a negative prompt; pass one or leave guidance out.')

    shape = (batch, plan.frames, plan.height, plan.width, plan.channels)
    initial = noise.initial(shape)
    coarse = down_noise(initial, stages - 1)
    # Sharded like the noise from the start: another sharding in the first unit would compile every stage twice.
    video = jnp.zeros_like(initial, jnp.float32)
    if first_frame is not None:
        video = video.at[:, :1].set(first_frame)

    for unit in range(first_unit, plan.frames):
        scale = plan.unit_guidance(unit)
        predict = denoise if scale is None or negative is None else guided(denoise, negative, scale)
        pyramid = levels(video, stages)
        units = jnp.full((batch,), unit, jnp.int32)
        x = coarse[:, unit : unit + 1]
        for stage in range(stages):
            if stage > 0:
                grid = (plan.height >> (stages - 1 - stage), plan.width >> (stages - 1 - stage))
                x = enter_stage(x, noise.block(unit, stage, (batch, 1, *grid, plan.channels)), stage, plan.schedule)
            history = envelope_history(pyramid, units, stage, plan.frames - 1)
            count = plan.unit_steps(unit)[stage]
            after = euler_steps(predict, plan.schedule, stage, count, history, x, units, prompt)
            for step, x in enumerate(after):
                on_step(unit, stage, step, x)
        video = video.at[:, unit : unit + 1].set(x)
    return video
