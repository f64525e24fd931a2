"""LPIPS against its definition in NumPy, on random weights in the published layout; and the difference of edges."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from neodragon_jax.base.errors import InputError
from support.goldens import relative_error
from train.vae.perceptual import LPIPS, edge_error, load_lpips

# (name in the published file, features, kernel, stride, padding, pool before: side), and where slices end.
VGG = [
    *[('net.slice1.0', 64, 3, 1, 1, 0), ('net.slice1.2', 64, 3, 1, 1, 0)],
    *[('net.slice2.5', 128, 3, 1, 1, 2), ('net.slice2.7', 128, 3, 1, 1, 0)],
    *[('net.slice3.10', 256, 3, 1, 1, 2), ('net.slice3.12', 256, 3, 1, 1, 0), ('net.slice3.14', 256, 3, 1, 1, 0)],
    *[('net.slice4.17', 512, 3, 1, 1, 2), ('net.slice4.19', 512, 3, 1, 1, 0), ('net.slice4.21', 512, 3, 1, 1, 0)],
    *[('net.slice5.24', 512, 3, 1, 1, 2), ('net.slice5.26', 512, 3, 1, 1, 0), ('net.slice5.28', 512, 3, 1, 1, 0)],
]
ALEX = [
    ('net.slice1.0', 64, 11, 4, 2, 0),
    ('net.slice2.3', 192, 5, 1, 2, 3),
    ('net.slice3.6', 384, 3, 1, 1, 3),
    ('net.slice4.8', 256, 3, 1, 1, 0),
    ('net.slice5.10', 256, 3, 1, 1, 0),
]
TABLES = {'vgg': VGG, 'alex': ALEX}


def state_dict(kind: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random weights under the names of lpips.LPIPS(net=kind).state_dict(), its copies and constants too."""
    rng, tensors, channels = np.random.default_rng(seed), {}, 3
    for name, features, kernel, *_ in TABLES[kind]:
        deviation = np.sqrt(2 / (channels * kernel**2))
        tensors[f'{name}.weight'] = deviation * rng.standard_normal((features, channels, kernel, kernel), np.float32)
        tensors[f'{name}.bias'] = 0.1 * rng.standard_normal(features, np.float32)
        linear = f'lin{int(name[9]) - 1}.model.1.weight'
        tensors[linear] = tensors[linear.replace('lin', 'lins.', 1)] = rng.random((1, features, 1, 1), np.float32)
        channels = features
    tensors['scaling_layer.shift'] = np.zeros((1, 3, 1, 1), np.float32)
    return tensors


def windows(x: np.ndarray, side: int, stride: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(x, (side, side), (2, 3))[:, :, ::stride, ::stride]


def by_definition(kind: str, tensors: dict[str, np.ndarray], got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Return LPIPS 0.1 of channels-last pictures, computed channels-first as it is published."""
    shift = np.array([-0.030, -0.088, -0.188]).reshape(3, 1, 1)
    scale = np.array([0.458, 0.448, 0.450]).reshape(3, 1, 1)
    x = (np.moveaxis(np.concatenate([got, want]).astype(np.float64), -1, 1) - shift) / scale
    ends = {name[9]: name for name, *_ in TABLES[kind]}.values()
    total = np.zeros(len(got))
    for name, _, kernel, stride, padding, pool in TABLES[kind]:
        if pool:
            x = windows(x, pool, 2).max(axis=(-2, -1))
        padded = np.pad(x, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
        patches = windows(padded, kernel, stride)
        x = np.tensordot(patches, tensors[f'{name}.weight'], ((1, 4, 5), (1, 2, 3)))
        x = np.maximum(np.moveaxis(x, -1, 1) + tensors[f'{name}.bias'].reshape(-1, 1, 1), 0)
        if name in ends:
            unit = x / (np.sqrt((x**2).sum(axis=1, keepdims=True)) + 1e-10)
            one, other = np.split(unit, 2)
            weights = tensors[f'lin{int(name[9]) - 1}.model.1.weight'].reshape(-1, 1, 1)
            total += ((one - other) ** 2 * weights).sum(axis=1).mean(axis=(1, 2))
    return total


def pictures(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize(('kind', 'suffix', 'size'), [('vgg', 'safetensors', (32, 40)), ('alex', 'npz', (67, 64))])
def test_published_weights_give_the_published_distance(tmp_path, kind, suffix, size):
    tensors, path = state_dict(kind), tmp_path / f'weights.{suffix}'
    if suffix == 'npz':
        np.savez(path, **tensors)
    else:
        safetensors.numpy.save_file(tensors, path)
    module, params = load_lpips(path)
    assert module.network == kind
    got, want = pictures(0, 2, *size, 3), pictures(1, 2, *size, 3)
    want[1] = got[1] + 0.1 * want[1]
    distance = jax.jit(module.apply)({'params': params}, got, want)
    error = relative_error(distance, by_definition(kind, tensors, got, want))
    print(f'{kind}: {distance}, {error:.1e}')
    assert error < 2e-5
    assert distance[1] < distance[0]
    assert not np.any(jax.jit(module.apply)({'params': params}, got[:1], got[:1]))


def test_the_gradient_is_finite_where_features_are_dead():
    """Biases of -100 leave no feature: the length is 0, and the gradient is 0 instead of NaN."""
    module = LPIPS('alex')
    got = jnp.asarray(pictures(0, 1, 32, 32, 3))
    params = jax.jit(module.init)(jax.random.key(0), got, got)['params']
    params['conv_0']['bias'] = jnp.full(64, -100.0)
    gradient = jax.jit(jax.grad(lambda x: module.apply({'params': params}, x, -got).sum()))(got)
    assert np.all(np.isfinite(gradient))


def test_wrong_files_are_named_with_a_remedy(tmp_path):
    with pytest.raises(InputError, match=r"none\.npz: no such file.*''"):
        load_lpips(tmp_path / 'none.npz')
    tensors = state_dict('alex')
    for name in ('broken.npz', 'broken.safetensors'):
        (tmp_path / name).write_bytes(b'PK\x03\x04 half a file')
        with pytest.raises(InputError, match='neither safetensors nor npz'):
            load_lpips(tmp_path / name)
    del tensors['lin2.model.1.weight']
    np.savez(tmp_path / 'part.npz', **tensors)
    with pytest.raises(InputError, match=r'lin2\.model\.1\.weight is missing for alex'):
        load_lpips(tmp_path / 'part.npz')
    tensors['lin2.model.1.weight'] = np.zeros((1, 100, 1, 1), np.float32)
    np.savez(tmp_path / 'shape.npz', **tensors)
    with pytest.raises(InputError, match=r'lin2\.model\.1\.weight has shape \[1, 100, 1, 1\], alex \[1, 384, 1, 1\]'):
        load_lpips(tmp_path / 'shape.npz')
    with pytest.raises(InputError, match='at least 32x32'):
        LPIPS('alex').init(jax.random.key(0), jnp.zeros((1, 24, 40, 3)), jnp.zeros((1, 24, 40, 3)))


def test_edges():
    want = jnp.asarray(pictures(0, 2, 3, 5, 4, 3))
    assert edge_error(want, want) == 0
    assert edge_error(want + 0.25, want) == pytest.approx(0, abs=1e-6)
    # A line of height 1 in frame 1, column 2: of 3 neighbors in a row 2 differ, of 2 in time 2, in a column none.
    line = jnp.zeros((1, 3, 5, 4, 1)).at[:, 1, :, 2].set(1.0)
    horizontally, in_time = 2 / 3 / 3, 1 / 4
    assert edge_error(line, jnp.zeros_like(line)) == pytest.approx((horizontally + in_time) / 3)
    # Pictures have no time.
    assert edge_error(line[:, 1:2], jnp.zeros_like(line[:, 1:2])) == pytest.approx(2 / 3 / 2)
