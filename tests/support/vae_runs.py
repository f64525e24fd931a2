"""Small autoencoders and their losses."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from neodragon_jax.checkpoint.abstract import example_inputs
from neodragon_jax.config.pyramid_flow import PyramidFlowVAEConfig
from neodragon_jax.models.native_decoder import NativeVAE
from neodragon_jax.models.vae import posterior_mean
from train.vae.rematerialize import MemoryConfig, decode, encode

SIZES = {
    'encoder_block_out_channels': (4, 4, 8),
    'encoder_layers_per_block': (1, 1, 1),
    'encoder_down_block_types': ('DownEncoderBlockCausal3D',) * 3,
    'encoder_spatial_down_sample': (True, True, True),
    'encoder_temporal_down_sample': (True, True, True),
    'encoder_block_dropout': (0.0, 0.0, 0.0),
    'encoder_norm_num_groups': 2,
    'decoder_block_out_channels': (4, 4, 8),
    'decoder_layers_per_block': (1, 1, 1),
    'decoder_up_block_types': ('UpDecoderBlockCausal3D',) * 3,
    'decoder_spatial_up_sample': (True, True, True),
    'decoder_temporal_up_sample': (True, True, True),
    'decoder_block_dropout': (0.0, 0.0, 0.0),
    'decoder_norm_num_groups': 2,
}


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@functools.cache
def native() -> tuple[NativeVAE, Any]:
    module = NativeVAE(PyramidFlowVAEConfig(**SIZES))
    return module, jax.jit(module.init)(jax.random.key(0), *example_inputs(module))['params']


def reconstruction_loss(module: Any, memory: MemoryConfig, video: jax.Array, params: Any) -> jax.Array:
    frames = decode(module, params, posterior_mean(encode(module, params, video, memory)), memory)
    return jnp.mean(jnp.square(frames - video))
