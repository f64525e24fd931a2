"""Perceptual differences of pictures: LPIPS, whose weights the user provides, and an edge error that needs none.

LPIPS compares the features of an image classification network. Per layer, features are scaled to unit length over their
channels; squared differences are weighted by learned numbers per channel, averaged over pixels, and summed over five
layers. `train.lpips_weights` makes the weights file from the published files. The state dict of lpips.LPIPS(net='vgg'),
saved as safetensors or npz, has the same tensors:

    net.slice{s}.{i}.weight [out, in, k, k]   convolution i of torchvision's VGG16 or AlexNet
    net.slice{s}.{i}.bias [out]
    lin{s-1}.model.1.weight [1, out, 1, 1]    weights of the features that end slice s

`lins.*` and `scaling_layer.*`, copies and constants, are ignored. 'alex' works like 'vgg'; the tensor names determine
the network.

Legend: N pictures, H W pixels, C channels, B clips, T frames.
Source: LPIPS 0.1, arXiv 1801.03924. Neodragon, arXiv 2511.06055, trains its decoder on squared error and LPIPS.
"""

from __future__ import annotations

import dataclasses
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Array, Float

from neodragon_jax.base.atomic import PathLike
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.paths import input_path

# Normalization of pictures in [-1, 1] to the statistics of the networks' training data.
SHIFT, SCALE = np.array(((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)), np.float32)
# Smallest side of a picture that survives the pooling of both networks.
SMALLEST_SIDE = 32
# Squared norm below which features count as zero.
_TINY = 1e-20

Pictures = Float[Array, 'N H W 3']
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution and its ReLU.

    Attributes:
      index: number of the convolution in torchvision's list.
      pool: whether a maximum pool comes before.
      output: whether the features after it are compared.
    """

    index: int
    features: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: bool = False
    output: bool = False


@dataclasses.dataclass(frozen=True)
class Network:
    """Layers, and the side of their pools; pools have stride 2."""

    layers: tuple[Layer, ...]
    pool: int


def _vgg() -> Network:
    layers, index = [], 0
    for block, (features, count) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for number in range(count):
            pool = block > 0 and number == 0
            index += pool  # a pool has an index as well
            layers.append(Layer(index, features, pool=pool, output=number == count - 1))
            index += 2  # convolution and ReLU
    return Network(tuple(layers), pool=2)


NETWORKS = {
    'vgg': _vgg(),
    'alex': Network(
        (
            Layer(0, 64, kernel=11, stride=4, padding=2, output=True),
            Layer(3, 192, kernel=5, padding=2, pool=True, output=True),
            Layer(6, 384, pool=True, output=True),
            Layer(8, 256, output=True),
            Layer(10, 256, output=True),
        ),
        pool=3,
    ),
}


class LPIPS(nn.Module):
    """The distance of pictures in [-1, 1] by one of the NETWORKS."""

    network: str
    dtype: Any = None

    @nn.compact
    def __call__(self, got: Pictures, want: Pictures) -> Float[Array, ' N']:
        """Return the distance of each pair, 0 for equal pictures.

        Raises:
          InputError: the pictures are too small for the network.
        """
        if min(got.shape[1:3]) < SMALLEST_SIDE:
            height, width = got.shape[1:3]
            raise InputError(f'LPIPS: pictures are {height}x{width}; give at least {SMALLEST_SIDE}x{SMALLEST_SIDE}.')
        network = NETWORKS[self.network]
        x = (jnp.concatenate([got, want]) - SHIFT) / SCALE
        distance, compared = jnp.zeros(got.shape[0]), 0
        for number, layer in enumerate(network.layers):
            if layer.pool:
                x = nn.max_pool(x, (network.pool, network.pool), (2, 2))
            kernel, padding = (layer.kernel, layer.kernel), ((layer.padding, layer.padding),) * 2
            convolution = nn.Conv(
                layer.features, kernel, layer.stride, padding, dtype=self.dtype, name=f'conv_{number}'
            )
            x = nn.relu(convolution(x))
            if layer.output:
                weights = self.param(f'weights_{compared}', nn.initializers.ones_init(), (layer.features,))
                one, other = jnp.split(_unit(x.astype(jnp.float32)), 2)
                distance += jnp.mean(jnp.square(one - other) @ weights, axis=(1, 2))
                compared += 1
        return distance


def _unit(features: Float[Array, 'N H W C']) -> Float[Array, 'N H W C']:
    """Scale features to unit length over their channels; zero features stay zero, with a gradient of 0."""
    square = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    return features * jax.lax.rsqrt(jnp.maximum(square, _TINY))


def load_lpips(path: PathLike, dtype: Any = None) -> tuple[LPIPS, Params]:
    """Read weights in the layout of the module's docstring.

    Returns:
      (module, params): in float32.
    Raises:
      InputError: the file is missing, damaged, or not LPIPS by VGG16 or AlexNet.
    """
    tensors = _read(input_path(path, 'lpips_weights'))
    layout = {name: _layout(network) for name, network in NETWORKS.items()}
    kind = next((name for name in layout if not layout[name].keys() - tensors.keys()), None)
    if kind is None:
        missing = {name: sorted(layout[name].keys() - tensors.keys()) for name in layout}
        name = min(missing, key=lambda name: len(missing[name]))
        raise InputError(
            f'{path}: not LPIPS weights ({missing[name][0]} is missing for {name}); python -m train.lpips_weights '
            'makes the file.'
        )
    params: Params = {}
    for name, (owner, leaf, shape) in layout[kind].items():
        value = np.asarray(tensors[name], np.float32)
        if value.shape != shape:
            raise InputError(f'{path}: {name} has shape {list(value.shape)}, {kind} {list(shape)}; save it again.')
        if leaf == 'kernel':
            value = value.transpose(2, 3, 1, 0)
        if leaf:
            params.setdefault(owner, {})[leaf] = value
        else:
            params[owner] = value.reshape(-1)
    return LPIPS(kind, dtype), params


def tensor_names(network: str) -> list[str]:
    """Return the names of all tensors of a weights file of one of the NETWORKS."""
    return list(_layout(NETWORKS[network]))


def _layout(network: Network) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Return name -> (layer, parameter or '', shape) of every tensor of a weights file, in this module's names."""
    layout: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    slice_number, channels = 1, 3
    for number, layer in enumerate(network.layers):
        prefix, owner = f'net.slice{slice_number}.{layer.index}', f'conv_{number}'
        layout[f'{prefix}.weight'] = (owner, 'kernel', (layer.features, channels, layer.kernel, layer.kernel))
        layout[f'{prefix}.bias'] = (owner, 'bias', (layer.features,))
        if layer.output:
            name = f'lin{slice_number - 1}.model.1.weight'
            layout[name] = (f'weights_{slice_number - 1}', '', (1, layer.features, 1, 1))
            slice_number += 1
        channels = layer.features
    return layout


def _read(path: pathlib.Path) -> Mapping[str, np.ndarray]:
    """Return the tensors of a safetensors or npz file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file. Pass LPIPS weights, or '' to train without LPIPS.")
    try:
        if path.suffix == '.npz':
            with np.load(path) as arrays:
                return dict(arrays)
        with safetensors.safe_open(path, framework='numpy') as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, zipfile.BadZipFile, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f'{path}: neither safetensors nor npz ({reason}). python -m train.lpips_weights makes the file.'
        ) from None


def edge_error(got: Float[Array, 'B T H W 3'], want: Float[Array, 'B T H W 3']) -> Float[Array, '']:
    """Return the difference of edges and motion: blur and flicker raise it, a wrong tint does not.

    The error is the mean absolute difference of neighboring pixels of got - want, averaged over the axes width, height
    and, in clips of several frames, time.
    """
    error = (got - want).astype(jnp.float32)
    axes = [axis for axis in (1, 2, 3) if error.shape[axis] > 1]
    return jnp.mean(jnp.stack([jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in axes]))
