"""Networks on pictures as phone graphs: VAE encoder and decoders, the UNet of the first frame, super-resolution.

Pictures are channels-last, as on the HTP, and every graph takes one picture. The host computes the UNet's embedding,
which depends only on the timestep and the prompt.

Legend: H W pixels, h w latent grid, C latent channels, L text tokens, T text width, E embedding width.
Source: arXiv 2511.06055, section 4.
"""

from __future__ import annotations

import os
import pathlib
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from export.graphs.stored_params import read_float32
from export.graphs.table import Params, PhoneGraph
from export.graphs.text import open_component
from neodragon_jax.generation.tokens import CLIP_LENGTH
from neodragon_jax.models.sdxl_unet import UNet2DConditionModel
from neodragon_jax.models.sdxl_vae import AutoencoderKL
from neodragon_jax.models.super_resolution import QuickSRNet
from neodragon_jax.models.vae import VideoVAE
from neodragon_jax.models.vae_decoder import memory_shapes

Path = str | os.PathLike[str]


def video_encoder(folder: Path, height: int, width: int) -> PhoneGraph:
    """Return the encoder of the first frame: `picture` [1, H, W, 3] -> `mean`, `log_variance` [1, h, w, C].

    A causal encoder treats a single frame as a picture: this is its exact 2-D form. Mean and log-variance are separate
    outputs, each with its own range. Only the mean is compared with JAX: a joint ratio would be misleadingly high.
    """
    vae = open_component(folder, VideoVAE)
    channels = vae.config.encoder_out_channels

    def apply(params: Params, picture: Array) -> tuple[Any, Any]:
        hidden = vae.apply({'params': params}, picture, method=lambda bound, x: bound.encoder(x))
        halves = (slice(None, channels), slice(channels, None))
        parts = [{name: leaf[..., half] for name, leaf in params['quant_conv'].items()} for half in halves]
        conv = nn.Conv(channels, (1, 1), dtype=vae.dtype, parent=None)
        mean, log_variance = (conv.apply({'params': part}, hidden) for part in parts)
        return mean, log_variance

    read = partial(read_float32, folder, 'encoder', 'quant_conv')
    inputs = {'picture': (1, height, width, 3)}
    return PhoneGraph('video_encoder', apply, inputs, ('mean', 'log_variance'), read, pathlib.Path(folder))


def video_decoder(folder: Path, height: int, width: int) -> PhoneGraph:
    """Return one step of the streaming decoder: `latent` [1, h, w, C] and memories -> `frames` [8, H, W, 3], memories.

    Inputs `memory_0`, `memory_1`, ... hold the state, zeros before the first step, and outputs `next_memory_0`, ... the
    state for the next step. Latents are de-normalized.

    Args:
      height, width: of the latent grid.
    """
    vae = open_component(folder, VideoVAE)

    def step(bound: VideoVAE, latent: Array, memories: tuple[Array, ...]) -> Any:
        return bound.decoder(bound.post_quant_conv(latent), memories)

    def apply(params: Params, latent: Array, *memories: Array) -> tuple[Array, ...]:
        frames, following = vae.apply({'params': params}, latent, memories, method=step)
        return (jnp.concatenate(frames), *following)

    shapes = memory_shapes(vae.config, 1, height, width)
    inputs = {'latent': (1, height, width, vae.config.encoder_out_channels)}
    inputs |= {f'memory_{index}': shape for index, shape in enumerate(shapes)}
    read = partial(read_float32, folder, 'decoder', 'post_quant_conv')
    following = tuple(f'next_memory_{index}' for index in range(len(shapes)))
    return PhoneGraph('video_decoder', apply, inputs, ('frames', *following), read, pathlib.Path(folder))


def first_frame_unet(folder: Path, height: int, width: int) -> PhoneGraph:
    """Return the UNet: `latent` [1, h, w, C], `text` [L, T], `embedding` [1, E] -> `noise` [1, h, w, C].

    Args:
      height, width: of the latent grid.
    """
    unet = open_component(folder, UNet2DConditionModel)
    config = unet.config

    def apply(params: Params, latent: Array, text: Array, embedding: Array) -> Any:
        return unet.apply({'params': params}, latent, text[None], embedding, method='denoise')

    inputs = {
        'latent': (1, height, width, config.in_channels),
        'text': (CLIP_LENGTH, config.cross_attention_dim),
        'embedding': (1, config.embedding_width),
    }

    def read() -> Params:
        params = read_float32(folder)
        return {name: tree for name, tree in params.items() if name not in UNET_HOST}

    return PhoneGraph('first_frame_unet', apply, inputs, ('noise',), read, pathlib.Path(folder))


# Parts of the UNet that run on the host.
UNET_HOST = ('time_embedding', 'add_embedding')


def first_frame_decoder(folder: Path, height: int, width: int) -> PhoneGraph:
    """Return the image decoder: `latent` [1, h, w, C], already divided by the scaling factor -> `picture` [1, H, W, 3].

    Args:
      height, width: of the latent grid.
    """
    vae = open_component(folder, AutoencoderKL)
    apply = lambda params, latent: vae.apply({'params': params}, latent, method='decode')
    read = partial(read_float32, folder, 'decoder', 'post_quant_conv')
    inputs = {'latent': (1, height, width, vae.config.latent_channels)}
    return PhoneGraph('first_frame_decoder', apply, inputs, ('picture',), read, pathlib.Path(folder))


def super_resolution(folder: Path, height: int, width: int) -> PhoneGraph:
    """Return QuickSRNet: `frame` [1, H, W, 3] -> `enlarged` [1, s H, s W, 3], both in [0, 1]."""
    network = open_component(folder, QuickSRNet)
    apply = lambda params, frame: network.apply({'params': params}, frame)
    read = partial(read_float32, folder)
    inputs = {'frame': (1, height, width, 3)}
    return PhoneGraph('super_resolution', apply, inputs, ('enlarged',), read, pathlib.Path(folder))
