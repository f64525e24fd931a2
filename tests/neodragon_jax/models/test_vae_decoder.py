"""Tests of the configurations of the small decoder."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.config.neodragon import TINY
from neodragon_jax.models.vae import (
    VideoVAE,
)


def random(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    ('time', 'space'), [((False, True, True), (True, False, True)), ((False, False, False), (True, True, True))]
)
def test_decoder_flags(time, space):
    """Other growth factors give consistent shapes and streaming."""
    # A configuration is accepted only if encoder and decoder agree.
    config = dataclasses.replace(
        TINY.video_vae,
        decoder_time_upscale=time,
        decoder_space_upscale=space,
        encoder_temporal_down_sample=(*time, False),
        encoder_spatial_down_sample=(*space, False),
        temporal_downsample_scale=2 ** sum(time),
        spatial_downsample_scale=2 ** sum(space),
    )
    model = VideoVAE(config)
    latents = random((1, 3, 2, 3, 16))
    shapes = jax.eval_shape(functools.partial(model.init, method='decode'), jax.random.key(0), latents)
    draw = np.random.default_rng(0).standard_normal
    variables = jax.tree.map(lambda x: draw(x.shape, np.float32) / np.sqrt(np.prod(x.shape[:-1]) or 1), shapes)
    growth, scale = 2 ** sum(time), 2 ** sum(space)
    frames = jax.jit(functools.partial(model.apply, method='decode'))(variables, latents)
    assert frames.shape == (1, 2 * growth + 1, 2 * scale, 3 * scale, 3)
    decode_step = jax.jit(functools.partial(model.apply, method='decode_step'))
    first, memories = decode_step(variables, latents[:, :1], model.init_memories(1, 2, 3))
    rest, _ = decode_step(variables, latents[:, 1:], memories)
    np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1)[:, growth - 1 :], frames, atol=1e-5)
