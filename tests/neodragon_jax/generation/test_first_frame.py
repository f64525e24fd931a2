"""Tests of the first frame's picture against the reference pipeline with the same random numbers."""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.generation import first_frame, pipeline
from neodragon_jax.generation.consistency_sampler import (
    TIMESTEPS,
    TRAIN_STEPS,
    Condition,
    DrawnPictureNoise,
    add_noise,
    boundary_weights,
    consistency,
    sample,
    signal_and_noise,
)
from neodragon_jax.generation.devices import Spread
from neodragon_jax.generation.tokens import DEFAULT_MODIFIER
from neodragon_jax.pyramid.sampler import DrawnNoise
from support.goldens import GOLDENS, TINY_CHECKPOINT, channels_last, relative_error
from support.sdxl import TOLERANCE, golden, stored

TRAJECTORY_TOLERANCE = 1e-4
# Share of bytes that a float error of 1e-6 may change by one, where a value lies halfway between two.
TURNED_BYTES = 1e-3


class Replay:
    """Noise from a golden."""

    def __init__(self, arrays: dict[str, np.ndarray], start: str, steps: str):
        self.arrays, self.start, self.steps, self.used = arrays, start, steps, 0

    def _take(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        x = jnp.asarray(channels_last(self.arrays[name]))
        assert x.shape == shape
        return x

    def initial(self, shape):
        return self._take(self.start, shape)

    def step(self, number, shape):
        self.used += 1
        return self._take(f'{self.steps}{number}', shape)


@functools.cache
def tiny_golden() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / 'tiny_checkpoint_golden.npz') as arrays:
        return {name: array for name, array in arrays.items() if name.startswith('hybrid_ssd1b')}


@functools.cache
def tiny_model() -> first_frame.FirstFrameModel:
    return first_frame.load(TINY_CHECKPOINT, height=128, width=256)


def count_turned(got: np.ndarray, want: np.ndarray) -> int:
    """Count the bytes that differ; none may differ by more than one."""
    assert got.shape == want.shape and got.dtype == want.dtype == np.uint8
    difference = np.abs(got.astype(int) - want.astype(int))
    assert difference.max() <= 1
    print(f'{np.count_nonzero(difference)} of {difference.size} bytes differ by one')
    return int(np.count_nonzero(difference))


# --- sampler -----------------------------------------------------------------------------------------------------


def test_schedule():
    assert list(TIMESTEPS) == golden()['lcm/timesteps'].tolist()
    alphas = golden()['f64/lcm/alphas_cumprod']
    got = [signal_and_noise(timestep) for timestep in range(TRAIN_STEPS)]
    np.testing.assert_allclose([signal**2 for signal, _ in got], alphas, rtol=1e-5)
    np.testing.assert_allclose([signal**2 + noise**2 for signal, noise in got], 1.0, rtol=1e-12)
    weights = [boundary_weights(timestep) for timestep in TIMESTEPS]
    np.testing.assert_allclose(weights, golden()['f64/lcm/c_skip_c_out'], rtol=1e-6)
    assert boundary_weights(0) == (1.0, 0.0)


def test_steps_on_fixed_predictions():
    x = channels_last(golden()['lcm/fixed/x0'])
    for number, timestep in enumerate(TIMESTEPS):
        take = lambda name, number=number: channels_last(golden()[f'lcm/fixed/{name}{number}'])
        clean = consistency(jnp.asarray(x), jnp.asarray(take('model_output')), timestep)
        assert relative_error(clean, take('denoised')) < TOLERANCE
        x = clean
        if number < 3:
            x = add_noise(clean, jnp.asarray(take('noise')), TIMESTEPS[number + 1])
        error = relative_error(x, take('prev_sample'))
        print(f'step {number}: {error:.1e}')
        assert error < TOLERANCE


def test_trajectory_and_picture():
    """From embeddings to the picture, with the golden's UNet and VAE; every step is compared."""
    unet, unet_params = stored('unet', 'UNet2DConditionModel')
    vae, vae_params = stored('vae', 'AutoencoderKL')
    text, pooled = golden()['cond/prompt_embeds'], golden()['cond/pooled']
    condition = Condition(jnp.asarray(text), jnp.asarray(pooled), jnp.asarray([[96.0, 128, 0, 0, 96, 128]]))
    denoise = jax.jit(lambda params, x, timestep, given: unet.apply({'params': params}, x, timestep, *given))
    noise, errors = Replay(golden(), 'pipe/x0', 'pipe/noise'), []

    def check(number: int, x: jax.Array) -> None:
        errors.append(relative_error(x, channels_last(golden()[f'pipe/latents_after_step{number}'])))

    latents = sample(functools.partial(denoise, unet_params), (1, 12, 16, 4), condition, noise, check)
    print('after each step:', *(f'{error:.1e}' for error in errors))
    assert len(errors) == 4 and max(errors) < TRAJECTORY_TOLERANCE and noise.used == 3
    decode = jax.jit(functools.partial(vae.apply, method='decode'))
    pixels = decode({'params': vae_params}, latents / vae.config.scaling_factor)
    want = golden()['pipe/image_float01_hwc']
    assert relative_error(np.clip(pixels[0] / 2 + 0.5, 0, 1), want) < TRAJECTORY_TOLERANCE
    got = first_frame.to_picture(np.asarray(pixels))[0]
    assert count_turned(got, golden()['pipe/image_uint8_hwc']) <= TURNED_BYTES * want.size


# --- conditioning ------------------------------------------------------------------------------------------------


def test_conditioning():
    first, first_params = stored('text_encoder', 'CLIPTextModel')
    second, second_params = stored('text_encoder_2', 'CLIPTextModelWithProjection')

    @jax.jit
    def condition(ids1: Any, ids2: Any) -> Condition:
        states = first.apply({'params': first_params}, ids1), second.apply({'params': second_params}, ids2)
        return first_frame.make_condition(*states, 96, 128)

    got = condition(golden()['cond/ids1'].astype(np.int32), golden()['cond/ids2'].astype(np.int32))
    for name, value in (('prompt_embeds', got.text), ('pooled', got.pooled)):
        error = relative_error(value, golden()[f'cond/{name}'])
        print(f'{name}: {error:.1e}')
        assert error < TOLERANCE
    np.testing.assert_array_equal(got.sizes, [[96, 128, 0, 0, 96, 128]])


# --- whole model -------------------------------------------------------------------------------------------------


def test_prompt_to_picture():
    arrays = tiny_golden()
    settings = json.loads((GOLDENS / 'tiny_checkpoint_golden.json').read_text())['hybrid_ssd1b']
    noise = Replay(arrays, 'hybrid_ssd1b/draw/ssd_x0', 'hybrid_ssd1b/draw/ssd_noise')
    pictures = tiny_model()([settings['prompt'] + DEFAULT_MODIFIER], noise)
    want = arrays['hybrid_ssd1b/out/ssd_image_uint8']
    assert count_turned(pictures[0], want) <= TURNED_BYTES * want.size


def test_picture_to_latent():
    """Resizing, scaling and encoding give the latent that the reference's video starts from."""
    arrays = tiny_golden()
    frames = first_frame.to_frames(arrays['hybrid_ssd1b/out/ssd_image_uint8'][None], 64, 128)
    assert frames.shape == (1, 1, 64, 128, 3) and frames.dtype == np.float32

    class Given(DrawnNoise):
        def posterior(self, shape: tuple[int, ...]) -> jax.Array:
            eps = channels_last(arrays['hybrid_ssd1b/draw/vae_eps'])
            assert eps.shape == shape
            return jnp.asarray(eps)

    noise = Given(pipeline.sample_keys(0, ['x'], [0]))
    latent = pipeline.encode_first_frame(pipeline.load(TINY_CHECKPOINT), frames, noise)
    want = channels_last(arrays['hybrid_ssd1b/out/latents_normalised'])[:, :1]
    assert relative_error(latent, want) < TOLERANCE


@pytest.mark.long
def test_a_picture_does_not_depend_on_its_batch_or_devices():
    spread = Spread(jax.devices()[:3])
    prompts, numbers = ['a cat', 'a dog', 'a cat'], [0, 0, 1]
    keys = pipeline.sample_keys(7, prompts, numbers)
    model = first_frame.load(TINY_CHECKPOINT, height=128, width=256, place=spread.replicate)
    together = model(prompts, DrawnPictureNoise(spread.shard(keys)), spread.shard).astype(int)
    for index in range(3):
        alone = tiny_model()(prompts[index : index + 1], DrawnPictureNoise(keys[index : index + 1]))
        assert np.abs(alone[0].astype(int) - together[index]).max() <= 1
    assert np.abs(together[0] - together[2]).max() > 1, 'sample number is ignored'


def test_draws_are_different():
    """No draw of a picture equals another draw of it or of its video, although both may use the same key."""
    keys = pipeline.sample_keys(0, ['x'], [0])
    picture, video, shape = DrawnPictureNoise(keys), DrawnNoise(keys), (1, 8, 8, 4)
    draws = [picture.initial(shape), *(picture.step(number, shape) for number in range(3))]
    draws += [draw((1, *shape)) for draw in (video.initial, video.posterior)]
    assert all(abs(np.corrcoef(np.ravel(x), np.ravel(y))[0, 1]) < 0.9 for x in draws for y in draws if x is not y)


def test_bytes_are_rounded():
    levels = np.array([-2.0, -1, 0, 1 - 1.1 / 255, 1 - 0.9 / 255, 1, 2], np.float32)
    pixels = np.broadcast_to(levels[:, None], (1, 1, 7, 3))
    np.testing.assert_array_equal(first_frame.to_picture(pixels)[0, 0, :, 0], [0, 0, 128, 254, 255, 255, 255])
    with pytest.raises(InputError, match='not numbers'):
        first_frame.to_picture(np.full((1, 1, 1, 3), np.nan, np.float32))


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """A copy of the first-frame components."""
    for folder in TINY_CHECKPOINT.glob('ssd_1b_*'):
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path


@pytest.mark.parametrize(('size', 'named'), [((72, 128), 'height 72.*use 64'), ((64, 0), 'width 0.*use 32')])
def test_sizes_that_do_not_fit(size, named):
    with pytest.raises(InputError, match=named):
        first_frame.load(TINY_CHECKPOINT, *size)


def test_missing_component(root):
    shutil.rmtree(root / 'ssd_1b_unet')
    with pytest.raises(InputError, match='no component "ssd_1b_unet"'):
        first_frame.load(root)


def test_component_of_another_class(root):
    shutil.rmtree(root / 'ssd_1b_vae')
    shutil.copytree(TINY_CHECKPOINT / 'causal_video_vae', root / 'ssd_1b_vae')
    with pytest.raises(
        InputError, match='ssd_1b_vae: holds an AsymmetricCausalVideoVAE; pass the folder of an AutoencoderKL'
    ):
        first_frame.load(root)


def test_text_encoders_of_another_model(root):
    shutil.rmtree(root / 'ssd_1b_text_encoder_2')
    shutil.copytree(root / 'ssd_1b_text_encoder', root / 'ssd_1b_text_encoder_2')
    with pytest.raises(InputError, match=r'widths \(48, 20\), the UNet takes \(56, 28\)'):
        first_frame.load(root)


def test_prompts_that_are_no_list():
    with pytest.raises(InputError, match=r'here \[prompt\]'):
        tiny_model()('a cat', DrawnPictureNoise(pipeline.sample_keys(0, ['a cat'], [0])))
