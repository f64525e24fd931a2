"""Parameters of new codecs, and causal convolutions in two dimensions."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from test_autoencoder import native, random, reconstruction_loss

from neodragon_jax.models.causal_layers import CausalConv
from neodragon_jax.models.native_decoder import NativeVAE, channels_to_space, channels_to_time
from neodragon_jax.models.vae import normalise, posterior_mean
from train import moving_shapes
from train.codec import fresh_codecs
from train.codec import latent_statistics as statistics
from train.codec.flat_convolutions import flat_convolutions
from train.codec.rematerialise import MemoryConfig
from train.data import clips
from train.shapes.world import CPU


def fresh() -> tuple[NativeVAE, Any]:
    module = native()[0]
    init = jax.jit(functools.partial(fresh_codecs.fresh_autoencoder, module))
    return module, init(jax.random.key(0), jnp.array([0.5, -0.25, 0.0]))


def test_fresh_parameters_are_drawn_as_flax_draws_them():
    module, params = native()
    drawn = jax.jit(functools.partial(fresh_codecs.drawn_parameters, module))(jax.random.key(1))
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(drawn) == shapes(params)
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(drawn), jax.tree.leaves(params), strict=True):
        if got.ndim == 1:
            assert np.array_equal(got, want), path
        else:
            deviation = np.prod(got.shape[:-1]) ** -0.5
            assert got.std() == pytest.approx(deviation, rel=4 / np.sqrt(got.size)), path
            assert got.std() == pytest.approx(want.std(), rel=6 / np.sqrt(got.size)), path
    kernels = np.concatenate(
        [np.ravel(leaf)[:64] for leaf in jax.tree.leaves(drawn) if leaf.size > 64 and leaf.ndim > 1]
    )
    assert len(np.unique(kernels)) == len(kernels)


def test_a_fresh_posterior_has_little_noise_and_expected_latents():
    module, params = fresh()
    videos = np.stack([moving_shapes.MovingShapesSource(CPU, 17, (32, 32))[i]['video'] for i in range(4)])
    moments = module.apply({'params': params}, clips.to_float(jnp.asarray(videos)), method='encode')
    assert np.array_equal(moments[..., 16:], np.full_like(moments[..., 16:], fresh_codecs.LOG_VARIANCE))
    measured = statistics.measure([np.asarray(moments)])
    print(measured)
    assert 0.5 < measured.later_deviation < 2 and abs(measured.later_mean) < 0.5
    latents = normalise(posterior_mean(moments), first_frame=False)
    layer = params['post_quant_conv']
    assert np.allclose(posterior_mean(moments) @ layer['kernel'][0, 0] + layer['bias'], latents, atol=1e-4)


def test_a_fresh_decoder_paints_the_mean_colour_without_a_checkerboard():
    module, params = fresh()
    frames = module.apply({'params': params}, 3 * random(2, 3, 4, 4, 16), method='decode')
    assert np.allclose(frames.mean(axis=(0, 1, 2, 3)), [0.5, -0.25, 0.0], atol=0.1)
    assert frames.std(axis=(1, 2, 3)).max() < 0.3
    x = random(1, 3, 4, 4, params['decoder']['up_0']['double_space']['kernel'].shape[3])
    for name, turn in (('double_space', channels_to_space), ('double_time', lambda x: channels_to_time(x, False))):
        kernel = params['decoder']['up_0'][name]['kernel']
        y = turn(CausalConv(kernel.shape[-1]).apply({'params': params['decoder']['up_0'][name]}, x))
        axes = (2, 3) if name == 'double_space' else (1,)
        for axis in axes:
            even, odd = (np.take(np.asarray(y), np.arange(start, y.shape[axis], 2), axis) for start in (0, 1))
            assert np.array_equal(even, odd) and even.std() > 0.1


def test_mean_colour():
    source = moving_shapes.MovingShapesSource(CPU, 9, (32, 32), count=3)
    want = np.mean([clips.to_float(jnp.asarray(source[i]['video'])) for i in range(3)], axis=(0, 1, 2, 3))
    assert np.allclose(fresh_codecs.mean_colour(source), want, atol=1e-4)  # a mean of 10^5 numbers in float32


@pytest.mark.parametrize('strides', [(1, 1, 1), (1, 2, 2), (2, 1, 1)])
@pytest.mark.parametrize('frames', [1, 2, 9])
def test_flat_convolutions_are_the_same(strides, frames):
    x, conv = random(2, frames, 8, 6, 5), CausalConv(7, strides)
    variables = {'params': {'kernel': random(3, 3, 3, 5, 7, seed=1), 'bias': random(7, seed=2)}}
    want = conv.apply(variables, x)
    with flat_convolutions(True):
        text = str(jax.make_jaxpr(conv.apply)(variables, x))
        got = conv.apply(variables, x)
    assert 'window_strides' in text and f'window_strides={strides}' not in text
    assert got.shape == want.shape and relative_error(got, want) < 1e-5


SPARING = MemoryConfig(blocks=True, window=8)


@pytest.mark.parametrize('memory', [MemoryConfig(), pytest.param(SPARING, marks=pytest.mark.slow)])
def test_flat_convolutions_change_neither_results_nor_gradients(memory):
    module, params = native()
    video = random(1, 17, 16, 16, 3)
    run = lambda: jax.jit(jax.value_and_grad(functools.partial(reconstruction_loss, module, memory, video)))(params)
    loss, want = run()
    with flat_convolutions(True):
        again, got = run()
    assert again == pytest.approx(float(loss), rel=1e-5)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    assert relative_error(flat(got), flat(want)) < 2e-5
