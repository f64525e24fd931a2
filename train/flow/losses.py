"""Objectives of pyramidal flow matching and of its step distillation, as pure functions of arrays.

Symbols, for one stage: `clean` is the unit's clean latent at the stage's resolution (z in the papers), `start` and
`end` are the two ends of the stage's flow (`pyramid.stages.stage_pair`), s0 and s1 the global noise levels there,
`flow` is start - end, and P = Up(Down(.)) is the mean of every 2x2 block.
Legend: B batch, T latent frames of a unit, h w the stage's grid, C channels.
Source: PF = Pyramid-Flow, arXiv 2410.05954, section 3; ND = Neodragon, arXiv 2511.06055, section on step distillation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.schedule import Schedule
from neodragon_jax.pyramid.stages import down, up

Latents = Float[Array, 'B T h w C']
PerSample = Float[Array, ' B']

CLEAN_PREDICTIONS = ('exact', 'paper')

# Smallest summed error in 1 / error: below it, the weight would amplify rounding.
_SMALLEST_ERROR = 1e-6


def per_sample(values: PerSample, like: Float[Array, 'B ...']) -> Float[Array, 'B ...']:
    """Return `values` in float32 with unit axes appended, so that it broadcasts against `like`."""
    return jnp.asarray(values, jnp.float32).reshape(-1, *[1] * (like.ndim - 1))


def interpolate(start: Latents, end: Latents, level: PerSample) -> Latents:
    """Return the point at a local level on the flow of a stage: level start + (1 - level) end (PF, equation 11)."""
    level = per_sample(level, start)
    return level * start + (1 - level) * end


def corrupt(clean: Latents, noise: Latents, amount: PerSample) -> Latents:
    """Return corrupted history, as in the teacher's training: amount noise + (1 - amount) clean, amount ~ U[0, 1/3].

    All history clips of a sample share one amount. Source: PF, section 3.4.
    """
    return interpolate(noise, clean, amount)


def detail_gain(stage: int, schedule: Schedule) -> float:
    """Return the factor by which the paper's clean prediction amplifies detail: s0 (1 - s1) / (s0 - s1).

    It is 1 at the coarsest stage (s0 = 1) and at the finest (s1 = 0). At the middle stage of the released schedule it
    is 1.1431.
    """
    s0, s1 = float(schedule.start_sigmas[stage]), float(schedule.end_sigmas[stage])
    return s0 * (1 - s1) / (s0 - s1)


def clean_prediction(
    x: Latents, flow: Latents, level: PerSample, stage: int, schedule: Schedule, kind: str = 'exact'
) -> Latents:
    """Return the clean latent of the stage that a predicted flow implies, in float32.

    'paper' extrapolates the flow to sigma = 0: y = x - sigma / (s0 - s1) flow, with sigma the global level. Both ends
    of a stage share their noise, so the noise cancels, and with the true flow

        y = (s0 (1 - s1) clean - s1 (1 - s0) P clean) / (s0 - s1) = P clean + gain (clean - P clean),

    which has `detail_gain` times the clean latent's detail. P is a projection, so 'exact' inverts this in closed form:
    it keeps P y and divides y - P y by the gain.

    Args:
      x: the denoiser's input at local level `level` of the stage.
      flow: the predicted start - end.
      kind: 'exact' or 'paper' (ND, equation of the student's clean estimate).
    Raises:
      InputError: `kind` is neither.
    """
    if kind not in CLEAN_PREDICTIONS:
        raise InputError(f'clean prediction is {kind!r}; use one of {", ".join(CLEAN_PREDICTIONS)}.')
    length = float(schedule.start_sigmas[stage] - schedule.end_sigmas[stage])
    sigma = per_sample(schedule.sigma(stage, level), x)
    y = x.astype(jnp.float32) - sigma / length * flow.astype(jnp.float32)
    gain = detail_gain(stage, schedule)
    # Decided at trace time: with a gain of 1 the grid may be too small to halve.
    if kind == 'paper' or abs(gain - 1) < 1e-9:
        return y
    blocks = up(down(y))
    return blocks + (y - blocks) / gain


def squared_error(prediction: Latents, target: Latents) -> PerSample:
    """Return the mean squared error of every sample, in float32: the flow matching loss (PF, equation 12)."""
    error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    return jnp.mean(jnp.square(error), axis=_elements(error))


def probe_weight(teacher_flow: Latents, flow: Latents) -> PerSample:
    """Return w = 1 / ||D(z_tau) - (y0 - y1)||_1, the L1 norm summed over a sample's elements (ND, DMD loss).

    Args:
      teacher_flow: D(z_tau), the teacher on the re-noised student prediction.
      flow: y0 - y1, the flow of that pair.
    """
    error = jnp.abs(teacher_flow.astype(jnp.float32) - flow.astype(jnp.float32))
    return 1 / jnp.maximum(jnp.sum(error, axis=_elements(error)), _SMALLEST_ERROR)


def matching_direction(teacher_flow: Latents, fake_flow: Latents, weight: PerSample) -> Latents:
    """Return weight (D - D_phi), the gradient of each sample's distribution matching loss by `z_theta` (ND, DMD).

    A flow is noise minus data, so gradient descent moves z_theta to where data is more likely under the teacher than
    under the fake model.
    """
    direction = teacher_flow.astype(jnp.float32) - fake_flow.astype(jnp.float32)
    return per_sample(weight, direction) * direction


def surrogate(z_theta: Latents, slope: Latents) -> Float[Array, '']:
    """Return a loss whose gradient by each sample of `z_theta` is slope / B; only its gradient is meaningful."""
    return jnp.sum(jax.lax.stop_gradient(slope) * z_theta.astype(jnp.float32)) / z_theta.shape[0]


def cauchy(z_theta: Latents, clean: Latents) -> PerSample:
    """Return log(1 + ||z_theta - clean||_2^2) of every sample, the norm over all its elements (ND, regression loss)."""
    error = z_theta.astype(jnp.float32) - clean.astype(jnp.float32)
    return jnp.log1p(jnp.sum(jnp.square(error), axis=_elements(error)))


def cauchy_slope(z_theta: Latents, target: Latents, factor: PerSample | float = 1.0) -> tuple[Latents, PerSample]:
    """Return the gradient of each sample's Cauchy loss by `z_theta`, times a factor, and the loss."""
    values, pull_back = jax.vjp(lambda z: cauchy(z, target), z_theta)
    return pull_back(jnp.broadcast_to(jnp.asarray(factor, values.dtype), values.shape))[0], values


def _elements(x: Array) -> tuple[int, ...]:
    """Return all axes but the batch."""
    return tuple(range(1, x.ndim))
