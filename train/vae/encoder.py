"""Encoding clips into normalized latents on all devices of a process.

Legend: B batch, F frames, Y X pixels, T latent frames, H W latent grid, C channels, M = 2C moments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from neodragon_jax.generation.devices import Spread
from neodragon_jax.models.vae import CausalVAE, encode_chunked, normalize, posterior_mean, posterior_sample
from train.vae.flat_convolutions import flat_convolutions


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The video encoder on all devices of this process.

    Attributes:
      size: clips per call.
      window: frames encoded at a time, see `encode_chunked`.
    """

    vae: CausalVAE
    params: Any
    fingerprint: str
    spread: Spread
    key: PRNGKeyArray
    sample: bool
    size: int
    window: int

    def __call__(
        self, clips: Sequence[UInt8[np.ndarray, 'F Y X 3']], indices: Sequence[int]
    ) -> Float[np.ndarray, 'B T H W C']:
        """Return the normalized latents of at most `size` clips; each depends on clip, index and seed alone."""
        full = lambda rows: [*rows, *[rows[-1]] * (self.size - len(rows))]
        video, numbers = self.spread.shard((np.stack(full(clips)), np.array(full(indices), np.int32)))
        with flat_convolutions(jax.default_backend() == 'cpu'):
            moments = encode_chunked(self.vae, self.params, _to_range(video), self.window)
        latents = _to_latents(moments, self.key, numbers, self.sample)
        return jax.device_get(latents)[: len(clips)]


@jax.jit
def _to_range(video: UInt8[Array, 'B F Y X 3']) -> Float[Array, 'B F Y X 3']:
    """Return bytes as numbers in [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1


@functools.partial(jax.jit, static_argnames='sample')
def _to_latents(
    moments: Float[Array, 'B T H W M'], key: PRNGKeyArray, indices: Int[Array, ' B'], sample: bool
) -> Float[Array, 'B T H W C']:
    """Return the normalized mean of the posterior, or a sample whose noise depends on the clip's index."""
    moments = moments.astype(jnp.float32)
    mean = posterior_mean(moments)
    if not sample:
        return normalize(mean)
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return normalize(posterior_sample(moments, noise))
