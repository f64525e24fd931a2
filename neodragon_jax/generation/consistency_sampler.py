"""Four-step sampler of the first-frame model: a distilled consistency model (LCM).

Legend: B pictures, h w latent grid, C latent channels, L text tokens, T width of both towers' states, P pooled width.
Source: Luo et al., Latent Consistency Models, arXiv 2310.04378.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from neodragon_jax.pyramid.sampler import POSTERIOR, Keys, fold_keys, white_noise

# Timesteps of the distilled model, and the noise schedule of its teacher.
TIMESTEPS = (999, 749, 499, 249)
BETAS = (0.00085, 0.012)
TRAIN_STEPS = 1000
# Width of the boundary at timestep 0, where a consistency function is the identity: deviation of the data, and the
# factor from timesteps to its unit.
DATA_DEVIATION, TIMESTEP_SCALE = 0.5, 10.0

Latents = Float[Array, 'B h w C']


class Condition(NamedTuple):
    """Conditioning of the UNet: text, pooled text and sizes."""

    text: Float[Array, 'B L T']  # penultimate states of both towers, side by side
    pooled: Float[Array, 'B P']  # pooled vector of the second tower
    sizes: Float[Array, 'B 6']  # original size, crop corner, target size


@runtime_checkable
class PictureNoise(Protocol):
    """Source of the random numbers of a picture."""

    def initial(self, shape: tuple[int, ...]) -> Latents:
        """Return the white noise to start from."""
        ...

    def step(self, number: int, shape: tuple[int, ...]) -> Latents:
        """Return the white noise added after step `number`, counted from 0; the last step adds none."""
        ...


@dataclasses.dataclass(frozen=True)
class DrawnPictureNoise:
    """Noise from one key per picture; the keys may be those of `sampler.DrawnNoise`, whose draws are different."""

    keys: Keys

    def initial(self, shape: tuple[int, ...]) -> Latents:
        return white_noise(fold_keys(self.keys, POSTERIOR + 1), shape[1:])

    def step(self, number: int, shape: tuple[int, ...]) -> Latents:
        return white_noise(fold_keys(self.keys, POSTERIOR + 2 + number), shape[1:])


def sample(
    denoise: Callable[[Array, Array, Condition], Array],
    shape: tuple[int, int, int, int],
    condition: Condition,
    noise: PictureNoise,
    on_step: Callable[[int, Latents], object] = lambda number, x: None,
) -> Latents:
    """Generate scaled latents [B, h, w, C] in four steps, without guidance.

    Args:
      denoise: (latents, timestep [B], condition) -> the noise in the latents.
      on_step: called after every step with (number, latents), for progress and tests.
    """
    x = noise.initial(shape)
    for number, timestep in enumerate(TIMESTEPS):
        predicted = denoise(x, jnp.full((shape[0],), timestep, jnp.float32), condition)
        clean = consistency(x, predicted, timestep)
        if number + 1 < len(TIMESTEPS):
            x = add_noise(clean, noise.step(number, shape), TIMESTEPS[number + 1])
        else:
            x = clean
        on_step(number, x)
    return x


def signal_and_noise(timestep: int) -> tuple[float, float]:
    """Return the shares of signal and noise at a timestep; their squares sum to 1.

    The square roots of beta, the variance added per step, are evenly spaced (arXiv 2112.10752, appendix).
    """
    low, high = np.sqrt(BETAS)
    signal = np.prod(1 - np.linspace(low, high, TRAIN_STEPS)[: timestep + 1] ** 2)
    return float(np.sqrt(signal)), float(np.sqrt(1 - signal))


def boundary_weights(timestep: int) -> tuple[float, float]:
    """Return the weights of the input and the prediction, for which the function is the identity at timestep 0."""
    time = timestep * TIMESTEP_SCALE
    variance = time**2 + DATA_DEVIATION**2
    return DATA_DEVIATION**2 / variance, time / float(np.sqrt(variance))


def consistency(x: Latents, predicted_noise: Latents, timestep: int) -> Latents:
    """Predict the clean latents at a step, in float32. Source: arXiv 2310.04378, equation 9."""
    signal, noise = signal_and_noise(timestep)
    keep, take = boundary_weights(timestep)
    clean = (x.astype(jnp.float32) - noise * predicted_noise.astype(jnp.float32)) / signal
    return take * clean + keep * x


def add_noise(clean: Latents, noise: Latents, timestep: int) -> Latents:
    """Return clean latents diffused to a timestep."""
    signal, deviation = signal_and_noise(timestep)
    return signal * clean + deviation * noise
