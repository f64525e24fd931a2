"""Tests of Pyramid-Flow's native video VAE: the reference's arrays, decoding in chunks, and the released names."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.abstract import tensor_shapes
from neodragon_jax.config.pyramid_flow import PYRAMID_FLOW_VAE, PyramidFlowVAEConfig
from neodragon_jax.models.native_decoder import NativeVAE, channels_to_space, channels_to_time, decode_chunked
from neodragon_jax.models.vae import encode_chunked, posterior_mean
from support.goldens import GOLDENS, channels_last, load_golden, relative_error

TOLERANCE = 2e-5
FOLDER = GOLDENS / 'pf_vae_decoder'


@pytest.fixture(scope='module')
def golden() -> dict[str, Any]:
    """All arrays, channels last where they are clips."""
    return {name: jnp.asarray(channels_last(x)) if x.ndim == 5 else x for name, x in load_golden(FOLDER.name).items()}


@functools.cache
def loaded() -> tuple[NativeVAE, dict[str, Any]]:
    """The golden's model and parameters."""
    module, params = checkpoint.load(FOLDER)
    assert isinstance(module, NativeVAE)
    return module, params


@functools.cache
def compiled(method: str):
    """A method of the golden's model as a compiled function of its input."""
    model, params = loaded()
    return jax.jit(lambda x: model.apply({'params': params}, x, method=method))


def random(shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize('latents', [1, 2, 3])
def test_decode(golden, latents):
    frames = compiled('decode')(golden[f'T{latents}/z'])
    error = relative_error(frames, golden[f'T{latents}/frames'])
    print(f'T{latents}: {error:.1e}')
    assert error < TOLERANCE


def test_decoder_stages(golden):
    model, params = loaded()
    run = functools.partial(model.apply, method='decode', capture_intermediates=True, mutable=['intermediates'])
    captured: dict[str, Any] = jax.jit(run)({'params': params}, golden['T2/z'])[1]['intermediates']['decoder']
    stages = {'mid': 'mid_resnet_1'} | {f'up{level}': f'up_{level}' for level in range(4)}
    for theirs, ours in stages.items():
        (got,) = captured[ours]['__call__']
        batch, channels, *grid = golden[f'T2/inter_{theirs}_shape']
        assert got.shape == (batch, *grid, channels), ours
        if f'T2/inter_{theirs}' in golden:
            assert relative_error(got, golden[f'T2/inter_{theirs}']) < TOLERANCE, ours


@pytest.mark.parametrize('window', [1, 2])
def test_chunked_decoding_equals_whole(golden, window):
    model, params = loaded()
    latents, want = golden['chunk_T5/z'], golden['chunk_T5/frames_full']
    frames = decode_chunked(model, params, latents, window)
    assert relative_error(frames, want) < TOLERANCE
    error = relative_error(frames, compiled('decode')(latents))
    print(f'chunked against whole, window {window}: {error:.1e}')
    assert error < 5e-6
    # The chunks are not independent: decoded alone, the last latents give different frames.
    assert not np.allclose(compiled('decode')(latents[:, 3:])[:, 1:], want[:, 25:], atol=1e-2)


def test_chunked_decoding_of_a_picture_and_a_short_last_chunk():
    model, params = loaded()
    for length in (1, 5):
        latents = random((2, length, 2, 3, 16))
        got = decode_chunked(model, params, latents, window=3)
        assert got.shape == (2, 8 * (length - 1) + 1, 16, 24, 3)
        assert relative_error(got, compiled('decode')(latents)) < 5e-6
    with pytest.raises(InputError, match='at least 1'):
        decode_chunked(model, params, latents, window=0)


def test_frames_do_not_see_the_future():
    latents = random((1, 3, 2, 2, 16))
    first, second = compiled('decode')(latents), compiled('decode')(latents.at[:, 2:].set(0))
    assert np.array_equal(first[:, :9], second[:, :9])
    assert not np.allclose(first[:, 9:], second[:, 9:], atol=1e-3)


def test_order_of_channels():
    """Channels are (C, row, column) and (C, frame), C slowest."""
    pixels = channels_to_space(jnp.arange(8.0).reshape(1, 1, 1, 8))
    assert np.array_equal(pixels[0, ..., 0], [[0, 1], [2, 3]]) and np.array_equal(pixels[0, ..., 1], [[4, 5], [6, 7]])
    clip = jnp.arange(8.0).reshape(1, 2, 1, 1, 4)
    later = channels_to_time(clip, first=False)
    assert np.array_equal(later[0, :, 0, 0], [[0, 2], [1, 3], [4, 6], [5, 7]])
    assert np.array_equal(channels_to_time(clip, first=True), later[:, 1:])
    assert np.array_equal(channels_to_time(clip[:, 0], first=True), later[:, 1])


def test_encode(golden):
    moments = compiled('encode')(golden['enc/in'])
    error = relative_error(moments, golden['enc/moments'])
    print(f'encode: {error:.1e}')
    assert error < TOLERANCE
    model, params = loaded()
    assert relative_error(encode_chunked(model, params, golden['enc/in'], window=8), moments) < 5e-6


def test_call_reconstructs_from_the_mean(golden):
    want = compiled('decode')(posterior_mean(golden['enc/moments']))
    assert relative_error(compiled('__call__')(golden['enc/in']), want) < TOLERANCE


def test_compute_type(golden):
    """bfloat16 compute keeps its type throughout and stays near float32."""
    model, params = loaded()
    latents = golden['T2/z']
    got = jax.jit(functools.partial(model.clone(dtype=jnp.bfloat16).apply, method='decode'))(
        {'params': params}, latents
    )
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, golden['T2/frames']) < 0.05


def test_names_at_full_size():
    want = json.loads((GOLDENS / 'manifest_full.json').read_text())['pyramid_flow_causal_video_vae']
    shapes = {key: list(leaf.shape) for key, leaf in tensor_shapes('CausalVideoVAE', PYRAMID_FLOW_VAE).items()}
    assert shapes == want['keys']
    decoder = sum(int(np.prod(shape)) for key, shape in shapes.items() if key.startswith('decoder'))
    assert decoder == want['subtotals']['decoder'] and round(decoder / 1e9, 3) == 0.226


def test_save_returns_what_was_loaded(tmp_path):
    checkpoint.save(tmp_path, *loaded())
    saved = tmp_path / 'diffusion_pytorch_model.safetensors'
    before, after = (safetensors.numpy.load_file(path) for path in (FOLDER / 'model.safetensors', saved))
    assert sorted(before) == sorted(after)
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    given, written = (json.loads((folder / 'config.json').read_text()) for folder in (FOLDER, tmp_path))
    assert given == written


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'interpolate': True}, 'interpolate is True'),
        ({'decoder_in_channels': 8}, 'decoder_in_channels is 8; supported: 16'),
        (
            {'decoder_layers_per_block': (3, 3)},
            'decoder_layers_per_block has 2 entries, decoder_block_out_channels has 4',
        ),
        ({'decoder_up_block_types': ('UpDecoderBlock2D',) * 4}, 'UpDecoderBlock2D'),
        ({'encoder_down_block_types': ('DownEncoderBlock2D',) * 4}, 'DownEncoderBlock2D'),
    ],
)
def test_other_architectures_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(PyramidFlowVAEConfig(), **changes)
