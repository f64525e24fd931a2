"""Initial parameters of a new video autoencoder, chosen to shorten its training.

* The layers outside residual branches begin as the best linear autoencoder of the data (`principal_start`). Channels
  beyond its components have the usual random initialization.
* Latents begin with the moments that later programs assume: quant_conv maps them to the mean and deviation of latents
  after the first one, and post_quant_conv inverts the map.
* The posterior's log-variance begins at the small value LOG_VARIANCE for every clip. With the usual deviation of 1,
  noise would dominate the latents, and a decoder would first learn to ignore them.
* Residual branches begin small, scaled by RESIDUAL (Goyal et al., arXiv 1706.02677, section 5.1, begin at 0).
* The small decoder's output begins at the mean color of the data, with low contrast.

Legend: C latent channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, PRNGKeyArray

from neodragon_jax.checkpoint.abstract import abstract_params
from neodragon_jax.models.native_decoder import NativeVAE
from neodragon_jax.models.vae import NEODRAGON, CausalVAE, VideoVAE
from train.data import Source

# Initial log-variance of the posterior: a deviation of 0.04 of that of the latents.
LOG_VARIANCE = -4.0
# Deviation of the standard normal distribution truncated at two deviations.
TRUNCATED_DEVIATION = 0.8796256610342398
# Initial contrast of a picture, relative to a variance-preserving convolution.
CONTRAST = 0.1
# Initial scale of the last layer of each residual branch, relative to a variance-preserving one.
RESIDUAL = 0.02
BRANCH_ENDS = (('conv_2', 'kernel'), ('mid_attention', 'out', 'kernel'))
# Number of clips averaged for the mean color.
COLOR_CLIPS = 16


def fresh_autoencoder(module: NativeVAE, key: PRNGKeyArray, start: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of a new autoencoder, initialized as the module's docstring describes.

    Args:
      start: parameters of the encoder and the decoder, from `principal_start.principal_layers`.
    """
    params = drawn_parameters(module, key)
    halves = {half: params[half] for half in ('encoder', 'decoder')}
    flat: dict[Any, Any] = dict(traverse_util.flatten_dict(halves))
    known: dict[Any, Any] = dict(traverse_util.flatten_dict(start))
    for path, leaf in flat.items():
        if any(path[-len(end) :] == end for end in BRANCH_ENDS):
            flat[path] = RESIDUAL * leaf
        elif path in known:
            kernel, bias = (known[*path[:-1], name] for name in ('kernel', 'bias'))
            used = jnp.any(kernel != 0, axis=tuple(range(kernel.ndim - 1))) | (bias != 0)
            flat[path] = jnp.where(used, known[path], leaf)
    return {
        **traverse_util.unflatten_dict(flat),
        'quant_conv': _fresh_moments(module.config.encoder_out_channels),
        'post_quant_conv': normalizing(module.config.encoder_out_channels),
    }


def fresh_small_decoder(module: VideoVAE, key: PRNGKeyArray, color: Float[Array, ' 3']) -> dict[str, Any]:
    """Return parameters of a new small decoder, without those of the encoder.

    The first convolution begins as the normalization of latents after the first one, so that they lie within the range
    of the following tanh.

    Args:
      color: mean color of the data, from `mean_color`.
    """
    decoder = drawn_parameters(module, key)['decoder']
    return {
        'decoder': {**decoder, 'conv_out': _fresh_picture(decoder['conv_out'], color)},
        'post_quant_conv': normalizing(module.config.encoder_out_channels),
    }


def _fresh_picture(layer: Mapping[str, Array], color: Float[Array, ' 3']) -> dict[str, Array]:
    """Return the convolution to pixels, with low contrast around a color."""
    return {'kernel': CONTRAST * layer['kernel'], 'bias': jnp.asarray(color, jnp.float32)}


def drawn_parameters(module: CausalVAE, key: PRNGKeyArray) -> dict[str, Any]:
    """Return parameters distributed as those of `module.init`; all kernels are slices of one random vector.

    XLA takes about a second to compile each random draw of a program, and the module's own initialization has a
    hundred. Kernels preserve the variance of their input; scales are 1 and biases 0.
    """
    shapes: dict[Any, Any] = dict(traverse_util.flatten_dict(abstract_params(module)))
    kernels = {path: leaf.shape for path, leaf in shapes.items() if path[-1] == 'kernel'}
    ends = list(itertools.accumulate(math.prod(shape) for shape in kernels.values()))
    # As in Flax: normal numbers truncated at two deviations, then scaled to a variance of 1.
    vector = jax.random.truncated_normal(key, -2, 2, (ends[-1],)) / TRUNCATED_DEVIATION
    constants = {'scale': jnp.ones, 'bias': jnp.zeros}
    params = {path: constants[path[-1]](leaf.shape) for path, leaf in shapes.items() if path not in kernels}
    for (path, shape), part in zip(kernels.items(), jnp.split(vector, ends[:-1]), strict=True):
        params[path] = part.reshape(shape) / math.sqrt(math.prod(shape[:-1]))
    return traverse_util.unflatten_dict(params)


def mean_color(clips: Source) -> Float[np.ndarray, ' 3']:
    """Return the mean of the first clips' pixels, in [-1, 1]."""
    videos = (np.asarray(clips[index]['video']) for index in range(min(COLOR_CLIPS, len(clips))))
    means = [video.mean(axis=(0, 1, 2)) for video in videos]
    return (np.mean(means, axis=0) / 127.5 - 1).astype(np.float32)


def normalizing(channels: int) -> dict[str, Array]:
    """Return a pointwise convolution that normalizes latents after the first one."""
    identity = jnp.eye(channels).reshape(1, 1, channels, channels)
    return {
        'kernel': NEODRAGON.scale * identity,
        'bias': jnp.full(channels, -NEODRAGON.shift * NEODRAGON.scale),
    }


def _fresh_moments(channels: int) -> dict[str, Array]:
    """Return the convolution to the moments: means from the first features, log-variances that are constant."""
    kernel = jnp.zeros((2 * channels, 2 * channels)).at[:channels, :channels].set(jnp.eye(channels) / NEODRAGON.scale)
    bias = jnp.concatenate([jnp.full(channels, NEODRAGON.shift), jnp.full(channels, LOG_VARIANCE)])
    return {'kernel': kernel.reshape(1, 1, *kernel.shape), 'bias': bias}
