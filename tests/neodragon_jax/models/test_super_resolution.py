"""Tests of QuickSRNet: against definitions in NumPy, the published file format and sizes, and enlarged frames."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.abstract import tensor_shapes
from neodragon_jax.checkpoint.weights import WEIGHT_FILES
from neodragon_jax.config.super_resolution import VARIANTS, SuperResolutionConfig, variant
from neodragon_jax.models.super_resolution import QuickSRNet, depth_to_space, upscale
from support.goldens import relative_error


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


def nearest(x: np.ndarray, factor: int) -> np.ndarray:
    return x.repeat(factor, axis=-3).repeat(factor, axis=-2)


def network(config: SuperResolutionConfig, randomness: float = 1.0):
    """Return (module, fresh parameters)."""
    module = QuickSRNet(config, randomness=randomness)
    return module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))['params']


@pytest.mark.parametrize('factor', [2, 3])
def test_depth_to_space_is_pixel_shuffle(factor):
    x = pictures(2, 3, 4, 3 * factor**2)
    got = np.asarray(depth_to_space(jnp.asarray(x), factor))
    for row in range(3 * factor):
        for column in range(4 * factor):
            channel = np.arange(3) * factor**2 + row % factor * factor + column % factor
            assert np.array_equal(got[:, row, column], x[:, row // factor, column // factor, channel])


@pytest.mark.parametrize(('name', 'factor'), [('small', 2), ('small', 3), ('medium', 4), ('large', 2)])
def test_without_randomness_a_fresh_network_is_nearest_neighbor(name, factor):
    module, params = network(variant(name, factor), randomness=0.0)
    x = pictures(2, 5, 6, 3)
    assert np.array_equal(jax.jit(module.apply)({'params': params}, x), nearest(x, factor))


def test_a_fresh_network_is_near_nearest_neighbor():
    """The random part is torch's default: uniform in +-1/sqrt(fan in) around the identity."""
    module, params = network(VARIANTS['large'])
    kernel = np.asarray(params['conv_5']['kernel'])
    noise = kernel - np.eye(64) * (np.arange(9) == 4).reshape(3, 3, 1, 1)
    bound = 1 / np.sqrt(9 * 64)
    assert 0.99 * bound < np.abs(noise).max() <= bound * 1.0001
    assert noise.std() == pytest.approx(bound / np.sqrt(3), rel=0.01)
    x = jnp.asarray(pictures(1, 4, 4, 3))
    assert not np.array_equal(module.apply({'params': params}, x), nearest(x, 2))


def conv_by_definition(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return torch's convolution of channels-first pictures with zeros around them, in float64."""
    size = weight.shape[-1]
    padded = np.pad(x, ((0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (2, 3))
    return np.einsum('bihwyx,oiyx->bohw', windows, weight) + bias[:, None, None]


def by_definition(tensors: dict[str, np.ndarray], config: SuperResolutionConfig, x: np.ndarray) -> np.ndarray:
    """Return QuickSRNet of channels-last pictures from a published state dict."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    layer = lambda y, name: conv_by_definition(y, tensors[f'{name}.weight'], tensors[f'{name}.bias'])
    hidden = x = np.moveaxis(x, -1, 1).astype(np.float64)
    for index in range(config.num_intermediate_layers + 1):
        hidden = np.clip(layer(hidden, f'cnn.{2 * index}'), 0, 1)
    out = layer(hidden, 'conv_last')
    if config.use_ito_connection:
        out += layer(x, 'anchor.net')
    return np.asarray(depth_to_space(jnp.asarray(np.moveaxis(np.clip(out, 0, 1), 1, -1)), config.scaling_factor))


@pytest.mark.parametrize('name', VARIANTS)
def test_published_state_dict(tmp_path, name):
    """A file with the published names gives the output of the definition, and is written back byte for byte."""
    config = VARIANTS[name]
    rng, tensors = np.random.default_rng(1), {}
    width, last = config.num_channels, 12
    shapes = {f'cnn.{2 * i}': (width, width if i else 3, 3, 3) for i in range(config.num_intermediate_layers + 1)}
    shapes |= {'conv_last': (last, width, 3, 3)} | ({'anchor.net': (last, 3, 1, 1)} if name == 'large' else {})
    for key, shape in shapes.items():
        scale = 1.5 / np.sqrt(np.prod(shape[1:]))
        tensors[f'{key}.weight'] = (scale * rng.standard_normal(shape)).astype(np.float32)
        tensors[f'{key}.bias'] = (0.2 * rng.random(shape[0])).astype(np.float32)
    label = {'_class_name': 'QuickSRNet', 'scaling_factor': 2, 'num_channels': width}
    label |= {'num_intermediate_layers': config.num_intermediate_layers, 'use_ito_connection': name == 'large'}
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'config.json').write_text(json.dumps(label))
    safetensors.numpy.save_file(tensors, tmp_path / 'a' / WEIGHT_FILES[0])

    module, params = checkpoint.load(tmp_path / 'a')
    assert module.config == config
    x = pictures(2, 6, 5, 3)
    got = jax.jit(module.apply)({'params': params}, x)
    assert np.std(got) > 0.05
    assert relative_error(got, by_definition(tensors, config, x)) < 2e-5

    checkpoint.save(tmp_path / 'b', module, params)
    again = safetensors.numpy.load_file(tmp_path / 'b' / WEIGHT_FILES[0])
    assert {key: (value.shape, value.tobytes()) for key, value in again.items()} == {
        key: (value.shape, value.tobytes()) for key, value in tensors.items()
    }
    assert checkpoint.load(tmp_path / 'b')[0].config == config


def test_published_pickles_are_refused_with_a_remedy(tmp_path):
    module, params = network(VARIANTS['small'])
    checkpoint.save(tmp_path, module, params)
    weights = tmp_path / WEIGHT_FILES[0]
    weights.rename(tmp_path / 'quicksrnet_small_2x_checkpoint_float32.pth.tar')
    with pytest.raises(InputError, match=r'float32\.pth\.tar .* safetensors'):
        checkpoint.load(tmp_path)


def test_published_sizes():
    """Parameters: the counts that follow from the model cards, 3x3 convolutions with biases throughout."""
    counts = {}
    for name, config in VARIANTS.items():
        shapes = tensor_shapes('QuickSRNet', config)
        counts[name] = sum(int(np.prod(shape.shape)) for shape in shapes.values())
    hidden = lambda width, layers: 28 * width + layers * (9 * width + 1) * width
    assert counts == {
        'small': hidden(32, 2) + (9 * 32 + 1) * 12,
        'medium': hidden(32, 5) + (9 * 32 + 1) * 12,
        'large': hidden(64, 11) + (9 * 64 + 1) * 12 + 4 * 12,
    }


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'scaling_factor': 1.5}, 'scaling_factor is 1.5; it must be 2, 3 or 4'),
        ({'in_channels': 1}, '1 input and 3 output channels'),
        ({'num_channels': 2}, 'num_channels is 2'),
        ({'num_intermediate_layers': -1}, 'num_intermediate_layers is -1'),
    ],
)
def test_sizes_that_do_not_work_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        SuperResolutionConfig(**values)


def test_unknown_variant_is_refused():
    with pytest.raises(InputError, match='Did you mean "medium"'):
        variant('mediun')


def test_upscale_keeps_kind_and_range():
    module, params = network(VARIANTS['small'], randomness=0.0)
    apply = jax.jit(lambda x: module.apply({'params': params}, x))
    small = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 6, 3), dtype=np.uint8)
    large = upscale(apply, small, at_once=4)
    assert large.dtype == np.uint8
    assert np.array_equal(large, nearest(small, 2))
    floats = small.astype(np.float32) / 127.5 - 1
    assert relative_error(upscale(apply, floats, at_once=4), nearest(floats, 2)) < 1e-6
    assert np.array_equal(upscale(apply, floats * 3), upscale(apply, np.clip(floats * 3, -1, 1)))


def test_upscale_calls_with_one_shape():
    shapes = []
    upscale(lambda x: shapes.append(x.shape) or x, pictures(5, 4, 6, 3), at_once=2)
    assert shapes == [(2, 4, 6, 3)] * 3
    with pytest.raises(InputError, match='there are none'):
        upscale(lambda x: x, pictures(0, 4, 6, 3))
