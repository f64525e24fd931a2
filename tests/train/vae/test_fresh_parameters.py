"""Parameters of new autoencoders, and causal convolutions in two dimensions."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import autoencoder as presets
from neodragon_jax.base.errors import InputError
from neodragon_jax.config.pyramid_flow import PyramidFlowVAEConfig
from neodragon_jax.models.causal_layers import CausalConv, frame_norm
from neodragon_jax.models.native_decoder import NativeVAE
from neodragon_jax.models.vae import normalize, posterior_mean
from support.goldens import relative_error
from support.vae_runs import native, random, reconstruction_loss
from train.data.sources import hold_out
from train.runtime.settings import freeze
from train.shapes.source import MovingShapesSource
from train.shapes.world import CPU
from train.vae import clips, fresh_parameters, principal_start
from train.vae import latent_statistics as statistics
from train.vae.flat_convolutions import flat_convolutions
from train.vae.principal_start import Patch
from train.vae.rematerialize import MemoryConfig

SCENES = MovingShapesSource(CPU, 17, (32, 32), count=40)


@functools.cache
def fresh() -> tuple[NativeVAE, Any]:
    module = native()[0]
    start = principal_start.principal_layers(module.config, hold_out(SCENES, 4)[0])
    return module, jax.jit(functools.partial(fresh_parameters.fresh_autoencoder, module))(jax.random.key(0), start)


def test_fresh_parameters_are_drawn_as_flax_draws_them():
    module, params = native()
    drawn = jax.jit(functools.partial(fresh_parameters.drawn_parameters, module))(jax.random.key(1))
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


def held_out_videos() -> jax.Array:
    return clips.to_float(jnp.asarray(np.stack([SCENES[index]['video'] for index in range(36, 40)])))


def test_a_fresh_posterior_has_little_noise_and_expected_latents():
    module, params = fresh()
    encode = jax.jit(functools.partial(module.apply, method='encode'))
    moments = encode({'params': params}, held_out_videos())
    assert np.array_equal(moments[..., 16:], np.full_like(moments[..., 16:], fresh_parameters.LOG_VARIANCE))
    measured = statistics.measure([np.asarray(moments)])
    print(measured)
    assert 0.7 < measured.later_deviation < 1.4 and abs(measured.later_mean) < 0.5
    latents = normalize(posterior_mean(moments), first_frame=False)
    layer = params['post_quant_conv']
    assert np.allclose(posterior_mean(moments) @ layer['kernel'][0, 0] + layer['bias'], latents, atol=1e-4)


@pytest.mark.long
def test_a_fresh_autoencoder_is_nearly_the_best_linear_one():
    sizes = dict(presets.get_config('shapes').autoencoder.sizes)
    module = NativeVAE(freeze(PyramidFlowVAEConfig, sizes, 'sizes'))
    scenes = MovingShapesSource(CPU, 17, (64, 64), count=68)
    training, held_out = hold_out(scenes, 4)
    start = principal_start.principal_layers(module.config, training)
    params = jax.jit(functools.partial(fresh_parameters.fresh_autoencoder, module))(jax.random.key(0), start)
    videos = clips.to_float(jnp.asarray(np.stack([held_out[index]['video'] for index in range(4)])))
    frames = jax.jit(module.apply)({'params': params}, videos)
    patches = principal_start.Patches(training, Patch(8, 8))
    rows = patches.basis(Patch(8, 8), 16).rows
    cut = videos[:, 1:].reshape(4, 2, 8, 8, 8, 8, 8, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 1536)
    cut = cut - np.tile(patches.color, 512)
    want = np.square(cut - cut @ rows.T @ rows).mean()
    got = np.square(frames - videos)[:, 1:].mean()
    print(want, got, np.square(cut).mean())
    assert want < got < 1.2 * want and got < 0.1 * np.square(cut).mean()


def test_components_of_small_patches_are_those_of_the_large_ones_parts():
    source = MovingShapesSource(CPU, 9, (16, 16), count=3)
    patches = principal_start.Patches(source, Patch(8, 8))
    videos = np.stack([source[i]['video'] for i in range(3)])[:, 1:].astype(np.float64) / 127.5 - 1
    cut = videos.reshape(3, 4, 2, 4, 4, 4, 4, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, 2 * 4 * 4 * 3)
    cut = cut - np.tile(videos.mean(axis=(0, 1, 2, 3)), 32)
    energy = np.linalg.eigvalsh(cut.T @ cut / len(cut))[::-1]
    basis = patches.basis(Patch(2, 4), 6)
    assert np.allclose(basis.energy, energy[:6], rtol=1e-3)
    assert np.allclose(np.square(cut @ basis.rows.T).mean(axis=0), energy[:6], rtol=1e-3)
    assert np.allclose(basis.rows @ basis.rows.T, np.eye(6), atol=1e-5)


@pytest.mark.parametrize('channels, groups', [(16, 1), (16, 2), (8, 4)])
def test_pairs_pass_components_through_norm_and_silu(channels, groups):
    pairs = principal_start.Pairs(3, channels, groups)
    x = 0.05 * np.asarray(random(5, 7, 7, 3)) + random(5, 1, 1, 3)  # what varies in a picture, and what does not
    norm = frame_norm(groups, None, 'norm')
    y = x @ pairs.sign.T + pairs.bias
    y = jax.nn.silu(norm.apply({'params': {'scale': jnp.ones(channels), 'bias': jnp.zeros(channels)}}, y))
    got = y @ pairs.back(np.square(x).mean(axis=(0, 1, 2))).T
    scale = np.square(got).sum() / np.sum(got * x)
    print(scale, relative_error(got, x))
    if channels // groups >= 4:
        assert 0.6 < scale < 1.4 and relative_error(got, x) < 0.4
    else:  # no constant term: only the sign of a constant input remains
        assert np.mean(np.sign(got) == np.sign(x)) > 0.95


def test_clips_smaller_than_a_latent_are_refused():
    source = MovingShapesSource(CPU, 1, (16, 16), count=3)
    with pytest.raises(InputError, match='8 frames of 8x8'):
        principal_start.principal_layers(native()[0].config, source)


def test_mean_color():
    source = MovingShapesSource(CPU, 9, (32, 32), count=3)
    want = np.mean([clips.to_float(jnp.asarray(source[i]['video'])) for i in range(3)], axis=(0, 1, 2, 3))
    assert np.allclose(fresh_parameters.mean_color(source), want, atol=1e-4)  # a mean of 10^5 numbers in float32


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


@pytest.mark.parametrize(
    'memory', [pytest.param(MemoryConfig(), marks=pytest.mark.long), pytest.param(SPARING, marks=pytest.mark.slow)]
)
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
