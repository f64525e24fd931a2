"""Training examples of pyramidal flow matching: a unit at a stage, its corrupted history, and the flow to predict.

    start = s0 noise + (1 - s0) Up(Down(clean)), end = s1 noise + (1 - s1) clean
    x     = level start + (1 - level) end, with target start - end
    history frame <- amount noise + (1 - amount) frame, amount ~ U[0, 1/3] per sample

Random numbers are drawn first (`draw`) and used afterwards (`build`), so that examples are a deterministic function of
them. A sample may be an image: it has only its first frame, and trains unit 0.

Source: Pyramid-Flow, arXiv 2410.05954, sections 3.2 to 3.4.
Legend: B batch, T latent frames (= units), H W full-size latent grid, h w the stage's, C channels.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.history import envelope_history, history_stage
from neodragon_jax.pyramid.schedule import Schedule
from neodragon_jax.pyramid.stages import down_noise, levels, stage_pair
from train.flow import losses

# Largest amount of noise in a history frame.
CORRUPTION = 1 / 3


class Draws(NamedTuple):
    """Random numbers of a batch of examples of one stage."""

    unit: Int[Array, ' B']
    level: Float[Array, ' B']  # local level, on the schedule's training grid
    amount: Float[Array, ' B']  # of noise in the history
    noise: Float[Array, 'B 1 H W C']  # of the unit at full size; coarser stages halve it
    history_noise: list[Float[Array, 'B 1 _ _ C']]  # of the envelope's T - 1 history frames, oldest first


class Example(NamedTuple):
    """A batch of denoiser inputs of one stage, each sample with its own unit, and the flow to predict."""

    unit: Int[Array, ' B']
    history: list[Float[Array, 'B 1 _ _ C']]
    x: Float[Array, 'B 1 h w C']
    timestep: Float[Array, ' B']
    flow: Float[Array, 'B 1 h w C']


def draw(
    key: PRNGKeyArray,
    stage: int,
    shape: tuple[int, ...],
    units: Int[Array, ' B'],
    schedule: Schedule,
    corruption: float = CORRUPTION,
    unit_weights: Sequence[float] = (),
) -> Draws:
    """Draw a unit, a level and all noise for every sample of a batch.

    Args:
      shape: shape of the batch's latents, [B, T, H, W, C].
      units: valid latent frames of each sample, 1 for an image; the unit is one of them.
      corruption: largest amount of noise in the history.
      unit_weights: see `draw_units`.
    """
    unit_key, level_key, amount_key, noise_key, history_key = jax.random.split(key, 5)
    batch, frames, height, width, channels = shape
    index = jax.random.randint(level_key, (batch,), 0, schedule.train_steps)
    grids = [
        schedule.stages - 1 - history_stage(stage, distance)  # halvings of the frame at each distance
        for distance in range(frames - 1, 0, -1)
    ]
    keys = jax.random.split(history_key, max(len(grids), 1))
    return Draws(
        unit=draw_units(unit_key, 0, units, unit_weights),
        level=jnp.asarray(schedule.train_levels, jnp.float32)[index],
        amount=jax.random.uniform(amount_key, (batch,), maxval=corruption),
        noise=jax.random.normal(noise_key, (batch, 1, height, width, channels)),
        history_noise=[
            jax.random.normal(key, (batch, 1, height >> halvings, width >> halvings, channels))
            for key, halvings in zip(keys, grids, strict=False)
        ],
    )


def build(stage: int, latents: Float[Array, 'B T H W C'], draws: Draws, schedule: Schedule) -> Example:
    """Return the examples of clean latents and drawn numbers, in float32.

    History frames have the shapes of the stage's envelope, padded at the front if the unit has a shorter history.
    """
    pyramid = levels(latents.astype(jnp.float32), schedule.stages)
    frames = envelope_history(pyramid, draws.unit, stage, latents.shape[1] - 1)
    clean = pyramid[stage][jnp.arange(latents.shape[0]), draws.unit][:, None]
    noise = down_noise(draws.noise, schedule.stages - 1 - stage)
    start, end = stage_pair(clean, noise, stage, schedule)
    return Example(
        unit=draws.unit,
        history=[
            losses.corrupt(frame, frame_noise, draws.amount)
            for frame, frame_noise in zip(frames, draws.history_noise, strict=True)
        ],
        x=losses.interpolate(start, end, draws.level),
        timestep=schedule.timestep(stage, draws.level),
        flow=start - end,
    )


def stage_of_step(seed: int, step: int, stages: int, weights: Sequence[float] = ()) -> int:
    """Return the stage that a step trains, drawn by a hash of seed and step and so equal on every machine.

    Args:
      weights: relative frequency of every stage; () for equal ones.
    """
    digest = hashlib.blake2b(f'{seed}/{step}'.encode(), digest_size=8).digest()
    number = int.from_bytes(digest, 'big')
    if not weights:
        return number % stages
    edges = itertools.accumulate(weights)
    level = number / 2**64 * sum(weights)
    return next(stage for stage, edge in enumerate(edges) if level < edge)


def draw_units(
    key: PRNGKeyArray, first: int, stop: Int[Array, ' B'], weights: Sequence[float] = ()
) -> Int[Array, ' B']:
    """Draw a unit in first..stop - 1 for every sample.

    Args:
      weights: relative frequency of the units from `first` on; units beyond are not drawn. () for equal frequencies.
    """
    if not weights:
        return jax.random.randint(key, stop.shape, first, stop)
    allowed = first + jnp.arange(len(weights)) < stop[:, None]
    logits = jnp.where(allowed, jnp.log(jnp.asarray(weights, jnp.float32)), -jnp.inf)
    return first + jax.random.categorical(key, logits)


def check_weights(name: str, weights: Sequence[float], count: int | None = None) -> None:
    """Raise InputError unless weights are () or non-negative numbers, not all 0.

    Args:
      count: required number of weights; None allows any.
    """
    if not weights:
        return
    valid = all(weight >= 0 for weight in weights) and 0 < sum(weights) < math.inf
    if not valid or (count is not None and len(weights) != count):
        number = 'numbers' if count is None else f'{count} numbers'
        raise InputError(f'{name} is {tuple(weights)}; give {number} of at least 0, not all 0, or ().')


def check_unit_weights(name: str, weights: Sequence[float], units: int) -> None:
    """Raise InputError if the weights leave out units of the longest clip without saying so.

    Args:
      name: the setting that they are from.
      weights: relative frequency of the units; () for equal ones.
      units: number of units of the longest clip that are trained.
    """
    if weights and len(weights) < units:
        raise InputError(
            f'{name} is {tuple(weights)}, but clips have {units} trained units: the last {units - len(weights)} would '
            f'never be trained. Give {units} numbers, 0 for a unit to leave out, or () for equal ones.'
        )


def unit_sums(values: Float[Array, ' B'], unit: Int[Array, ' B'], frames: int) -> Float[Array, '2 T']:
    """Return for every unit the sum of its examples' values, and the number of its examples."""
    here = jax.nn.one_hot(unit, frames)
    return jnp.stack([values @ here, jnp.sum(here, axis=0)])


def unit_means(sums: Float[Array, '2 T'], name: str) -> dict[str, Float[Array, '']]:
    """Return '{name}/unit{u}' -> mean of the values at unit u, NaN where there are none."""
    return {f'{name}/unit{unit}': mean for unit, mean in enumerate(sums[0] / sums[1])}
