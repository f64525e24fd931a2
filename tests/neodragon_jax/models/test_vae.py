"""Tests of the video VAE: the reference's arrays, equalities between its forms, and the released names."""

from __future__ import annotations

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import to_uint8
from neodragon_jax.checkpoint.names.vae import video_vae_names
from neodragon_jax.models.vae import (
    PYRAMID_FLOW,
    VideoVAE,
    denormalize,
    encode_chunked,
    encode_tiled,
    normalize,
    posterior_mean,
    posterior_sample,
)
from neodragon_jax.models.vae_decoder import double_space
from support.goldens import channels_last, load_golden, relative_error
from support.vae_folders import read

TOLERANCE = 2e-5


@pytest.fixture(scope='module')
def golden() -> dict[str, Any]:
    """All arrays, channels last where they are clips."""
    arrays = load_golden('video_vae')
    clips = {name: jnp.asarray(channels_last(x)) for name, x in arrays.items() if x.ndim == 5}
    return {**arrays, **clips}


@functools.cache
def loaded() -> tuple[VideoVAE, dict[str, Any]]:
    """The golden's model and parameters."""
    config, tensors = read('golden')
    flat = {entry.path: entry.convert.to_flax(tensors[entry.torch_name]) for entry in video_vae_names(config)}
    return VideoVAE(config), flax.traverse_util.unflatten_dict(flat)


@functools.cache
def compiled(method: str):
    """A method of the golden's model as a compiled function of its inputs."""
    model, params = loaded()
    return jax.jit(lambda *inputs: model.apply({'params': params}, *inputs, method=method))


def intermediates(method: str, x: jax.Array) -> dict[str, Any]:
    """Return the output of every module during a method of the golden's model."""
    model, params = loaded()
    run = functools.partial(model.apply, method=method, capture_intermediates=True, mutable=['intermediates'])
    return jax.jit(run)({'params': params}, x)[1]['intermediates']


def random(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


# --- encoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('frames', [1, 9, 17])
def test_encode(golden, frames):
    moments = compiled('encode')(golden[f'enc_T{frames}/in'])
    assert relative_error(moments, golden[f'enc_T{frames}/moments']) < TOLERANCE


def test_encoder_stages(golden):
    captured = intermediates('encode', golden['enc_T9/in'])
    stages = {f'down{index}': f'down_{index}' for index in range(4)} | {'mid': 'mid_resnet_1'}
    for theirs, ours in stages.items():
        (got,) = captured['encoder'][ours]['__call__']
        assert relative_error(got, golden[f'enc_T9/inter_{theirs}']) < TOLERANCE, ours


@pytest.mark.parametrize(('frames', 'window'), [(17, 8), (25, 8), (25, 16)])
def test_chunked_encoding_equals_whole(golden, frames, window):
    model, params = loaded()
    video = golden['chunk/in_longest'][:, :frames]
    moments = encode_chunked(model, params, video, window)
    assert relative_error(moments, golden[f'chunk_T{frames}_w{window}/moments_chunked']) < TOLERANCE
    assert relative_error(moments, golden[f'chunk_T{frames}_w{window}/moments_full']) < TOLERANCE
    assert relative_error(moments, compiled('encode')(video)) < 5e-6


def test_chunked_encoding_of_a_picture_and_a_short_last_chunk():
    model, params = loaded()
    for frames in (1, 25):
        video = random((2, frames, 16, 16, 3))
        assert relative_error(encode_chunked(model, params, video, 16), compiled('encode')(video)) < 5e-6


def test_tiled_encoding(golden):
    pixels = golden['tiled32/in']  # 64 x 96
    moments = encode_tiled(compiled('encode'), pixels, tile=32, overlap=8)
    assert relative_error(moments, golden['tiled32/moments']) < TOLERANCE
    assert relative_error(moments, compiled('encode')(pixels)) > 1e-3  # Tiling is an approximation.
    assert np.array_equal(encode_tiled(compiled('encode'), pixels, tile=96), compiled('encode')(pixels))


def test_tiles_without_overlap_stand_side_by_side():
    pixels = random((1, 1, 16, 32, 3))
    halves = [compiled('encode')(pixels[:, :, :, left : left + 16]) for left in (0, 16)]
    tiled = encode_tiled(compiled('encode'), pixels, tile=16, overlap=0)
    assert np.array_equal(tiled, jnp.concatenate(halves, axis=3))


def test_a_picture_is_a_clip_of_one_frame(golden):
    """The 2-D network equals the 3-D one, on the one frame and as the start of a longer clip."""
    model, params = loaded()
    picture = compiled('encode')(golden['enc_T1/in'])
    volume = jax.jit(lambda x: model.apply({'params': params}, x, method=lambda vae, x: vae.quant_conv(vae.encoder(x))))
    in_three_dimensions = volume(golden['enc_T1/in'])
    assert relative_error(picture, in_three_dimensions) < 5e-6
    clip = golden['enc_T9/in']
    assert relative_error(compiled('encode')(clip[:, :1]), compiled('encode')(clip)[:, :1]) < 5e-6


def test_a_picture_takes_a_third_of_the_arithmetic():
    """This holds for the 3x3x3 convolutions; on one frame, no other arithmetic is saved."""
    config, _ = read('golden')
    model, variables = VideoVAE(config), {'params': loaded()[1]}
    picture = jnp.zeros((1, 1, 64, 64, 3))
    volume = lambda vae, x: vae.quant_conv(vae.encoder(x))

    def multiplications(method: Any) -> float:
        """Sum outputs x kernel weights / output channels over all convolutions of the program."""
        jaxpr = jax.make_jaxpr(lambda x: model.apply(variables, x, method=method))(picture)
        convs = [equation for equation in jaxpr.eqns if equation.primitive.name == 'conv_general_dilated']
        assert len(convs) > 20
        sizes = [(conv.outvars[0].aval, conv.invars[1].aval) for conv in convs]
        return sum(np.prod(out.shape) * np.prod(kernel.shape[:-1]) for out, kernel in sizes)

    assert multiplications('encode') / multiplications(volume) == pytest.approx(1 / 3, rel=0.05)


def test_frames_do_not_see_the_future():
    video = random((1, 17, 16, 16, 3))
    changed = video.at[:, 9:].set(0)
    first, second = compiled('encode')(video), compiled('encode')(changed)
    assert np.array_equal(first[:, :2], second[:, :2])
    assert not np.allclose(first[:, 2], second[:, 2], atol=1e-3)


@pytest.mark.parametrize(
    ('shape', 'words'),
    [
        ((1, 8, 16, 16, 3), '8 frames; cut it to 8k \\+ 1'),
        ((1, 1, 20, 16, 3), '20x16; resize or crop it to multiples of 8'),
    ],
)
def test_clips_that_do_not_divide_are_refused(shape, words):
    with pytest.raises(InputError, match=words):
        compiled('encode')(jnp.zeros(shape))


def test_windows_and_tiles_that_do_not_divide_are_refused():
    model, params = loaded()
    for window in (0, 12):
        with pytest.raises(InputError, match='multiple of 8'):
            encode_chunked(model, params, jnp.zeros((1, 25, 16, 16, 3)), window)
    for tile, overlap in ((32, 32), (30, 8), (32, 4), (32, -8)):
        with pytest.raises(InputError, match='multiples of 8'):
            encode_tiled(compiled('encode'), jnp.zeros((1, 1, 64, 64, 3)), tile, overlap)


# --- latents -----------------------------------------------------------------------------------------------------


def test_normalization_constants(golden):
    image_scale, image_shift, video_scale, video_shift = golden['constants/VAE_SCALE_SHIFT_VIDEOSCALE_VIDEOSHIFT']
    latents = random((2, 3, 2, 2, 16))
    got = normalize(latents)
    assert relative_error(got[:, :1], (latents[:, :1] - image_shift) * image_scale) < 1e-7
    assert relative_error(got[:, 1:], (latents[:, 1:] - video_shift) * video_scale) < 1e-7
    later = normalize(latents, first_frame=False)
    assert np.array_equal(later[:, 1:], got[:, 1:]) and not np.allclose(later[:, 0], got[:, 0])
    for first_frame in (True, False):
        assert relative_error(denormalize(normalize(latents, first_frame), first_frame), latents) < 1e-6


def test_pyramid_flow_normalizes_by_its_own_constants():
    """Pyramid-Flow divides a picture by 1.8415 and later frames by 3.0986 (arXiv 2410.05954, its released pipeline)."""
    latents = random((1, 2, 2, 2, 16))
    got = normalize(latents, statistics=PYRAMID_FLOW)
    assert relative_error(got[:, 0], (latents[:, 0] - 0.1490) / 1.8415) < 1e-6
    assert relative_error(got[:, 1], (latents[:, 1] + 0.2343) / 3.0986) < 1e-6
    assert relative_error(denormalize(got, statistics=PYRAMID_FLOW), latents) < 1e-6


def test_posterior_clamps_the_log_variance():
    moments = jnp.concatenate([jnp.ones((1, 1, 1, 1, 2)), jnp.array([-1000.0, 1000.0]).reshape(1, 1, 1, 1, 2)], axis=-1)
    sample = posterior_sample(moments, jnp.ones((1, 1, 1, 1, 2)))
    want = 1 + np.exp(np.array([-15.0, 10.0]))
    assert relative_error(sample.reshape(-1), want) < 1e-6
    assert np.array_equal(posterior_mean(moments), np.ones((1, 1, 1, 1, 2)))


def test_round_trip(golden):
    latents = posterior_sample(compiled('encode')(golden['roundtrip/in']), golden['roundtrip/eps'])
    assert relative_error(latents, golden['roundtrip/z']) < TOLERANCE
    assert relative_error(compiled('decode')(latents), golden['roundtrip/recon']) < TOLERANCE


def test_call_reconstructs_from_the_mean(golden):
    video = golden['roundtrip/in']
    want = compiled('decode')(posterior_mean(compiled('encode')(video)))
    assert relative_error(compiled('__call__')(video), want) < 5e-6


# --- decoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('latents', [1, 2, 3])
def test_decode(golden, latents):
    frames = compiled('decode')(golden[f'dec_T{latents}/in'])
    assert relative_error(frames, golden[f'dec_T{latents}/out_parallel']) < TOLERANCE
    (post_quant,) = intermediates('decode', golden[f'dec_T{latents}/in'])['post_quant_conv']['__call__']
    want = golden[f'dec_T{latents}/post_quant']
    assert relative_error(post_quant.reshape(want.shape), want) < TOLERANCE


def stream(latents: jax.Array, step: int = 1) -> jax.Array:
    """Decode `step` latents at a time, and drop the frames before the first one."""
    batch, length, height, width, _ = latents.shape
    memories, frames = loaded()[0].init_memories(batch, height, width), []
    for start in range(0, length, step):
        new, memories = compiled('decode_step')(latents[:, start : start + step], memories)
        frames.append(new)
    return jnp.concatenate(frames, axis=1)[:, 7:]


def test_streaming_golden(golden):
    assert relative_error(stream(golden['dec_T2/in']), golden['dec_T2/out_sequential']) < TOLERANCE


def test_streaming_equals_whole_clip():
    latents = random((2, 5, 3, 4, 16))
    whole = compiled('decode')(latents)
    assert whole.shape == (2, 33, 24, 32, 3)
    for step in (1, 2):
        np.testing.assert_allclose(stream(latents, step), whole, atol=1e-5)
    assert not np.allclose(stream(latents[:, 1:]), whole[:, 8:], atol=1e-2)  # The memories matter.


def test_decoder_blocks(golden):
    """Every numbered layer of the released decoder, with the frames of a latent in order."""
    captured = intermediates('decode', golden['dec_inter/in'])
    (post_quant,) = captured['post_quant_conv']['__call__']

    def frames(phases: Any) -> jax.Array:
        stacked = jnp.stack(phases, axis=1)
        return stacked.reshape(-1, *stacked.shape[2:])

    layers = {0: 3 * jnp.tanh(post_quant / 3), 1: frames(captured['decoder']['conv_in']['__call__'])}
    layers[2] = jax.nn.relu(layers[1])
    for level in range(3):
        number = 3 + 6 * level
        for index in range(3):
            ((phases, _),) = captured['decoder'][f'level_{level}_memory_{index}']['__call__']
            layers[number + index] = frames(phases)
        layers[number + 3] = double_space(layers[number + 2])
        grown = captured['decoder'][f'level_{level}_grow']['__call__']
        layers[number + 4] = frames([frame for x in grown for frame in jnp.split(x, 2, axis=-1)])
        layers[number + 5] = frames(captured['decoder'][f'level_{level}_out']['__call__'])
    assert relative_error(compiled('decode')(golden['dec_inter/in']), golden['dec_inter/out']) < TOLERANCE
    wanted = {int(name[-2:]): x for name, x in golden.items() if name.startswith('dec_inter/block')}
    assert len(wanted) == 18
    for number, want in wanted.items():
        got = jnp.moveaxis(layers[number], -1, 1)
        assert relative_error(got, want) < TOLERANCE, number


@pytest.mark.parametrize('latents', [1, 3])
def test_decode_from_normalized_latents_to_bytes(golden, latents):
    name = f'decode_latent_T{latents}'
    frames = compiled('decode')(denormalize(golden[f'{name}/latents_normalised']))[0]
    assert relative_error(frames, golden[f'{name}/frames_float_BT_H_W_C']) < TOLERANCE
    got, want = to_uint8(frames), golden[f'{name}/frames_uint8']
    # Truncation turns a difference in the last bit into one step of brightness, where it falls on an integer.
    difference = np.abs(got.astype(int) - want)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


@pytest.mark.parametrize(('method', 'shape'), [('encode', (1, 9, 16, 16, 3)), ('decode', (1, 2, 2, 2, 16))])
def test_compute_type(method, shape):
    """bfloat16 compute keeps its type throughout and stays near float32."""
    model, params = VideoVAE(read('golden')[0], jnp.bfloat16), loaded()[1]
    got = jax.jit(functools.partial(model.apply, method=method))({'params': params}, random(shape))
    assert got.dtype == jnp.bfloat16
    assert relative_error(got, compiled(method)(random(shape))) < 0.05
    assert {memory.dtype for memory in model.init_memories(1, 2, 2)} == {jnp.dtype(jnp.bfloat16)}
