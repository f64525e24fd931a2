"""Linear initialization of a video autoencoder from the principal components of the data.

An autoencoder without residual branches, SiLU and norms is linear, and the best linear one is known in closed form: its
latents are the first C principal components of patches of 8 frames of 8x8 pixels. Here they are computed layer by
layer. After each layer, a grid position represents a patch of t frames of s x s pixels, and its channels hold the first
components of such patches (basis B of p, orthonormal rows, scaled to a mean square of 1):

    halving,  patches p -> q:   kernel at sub-patch j of q   = B(q) restricted to j   B(p)^T
    doubling, patches q -> p:   channels of sub-patch j of q = B(p)   (B(q) restricted to j)^T

The norm and SiLU before the last convolution preserve the components: the channels hold pairs x, -x, for which
silu(x) - silu(-x) = x. An additional constant channel keeps the norm from removing the contrast of the picture.

The first frame of a video is preceded by zeros, so its linear map differs; it is left to training.

Source: Baldi and Hornik, Neural Networks 2, 1989 (principal components as the optimum of a linear autoencoder). The
layer-by-layer layout is specific to this project.
Legend: C D channels in and out, K components, N patches, P numbers of a patch (t s s 3), t s frames and side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from jaxtyping import Float

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.pyramid_flow import PyramidFlowVAEConfig
from train.data import Source

# Numbers of clips to read and of patches to sample from them.
CLIPS, PATCHES = 64, 16_384
# Smallest mean square of a component, for clips of a single color.
LEAST = 1e-6
# Value of the constant channel before the last norm, relative to the components' root mean square.
CONSTANT = 2.0

Layer = dict[str, Float[np.ndarray, '*S']]
Layers = dict[tuple[str, ...], Layer]


class Patch(NamedTuple):
    """The part of a video that a grid position represents: number of frames, and side in pixels."""

    frames: int
    side: int

    @property
    def numbers(self) -> int:
        """Return the number of pixels times three."""
        return 3 * self.frames * self.side**2


class Basis(NamedTuple):
    """The first components of a patch.

    Attributes:
      rows: K orthonormal rows.
      energy: mean square of each component in the data.
    """

    patch: Patch
    rows: Float[np.ndarray, 'K P']
    energy: Float[np.ndarray, ' K']

    @property
    def gain(self) -> float:
        """Return the factor that scales the components to a mean square of 1."""
        return 1 / math.sqrt(float(self.energy.mean()))


class Patches:
    """Covariance of the largest patches of some clips; it contains the covariances of smaller patches."""

    def __init__(self, clips: Source, largest: Patch) -> None:
        """Read the first clips.

        Raises:
          InputError: no clip has a patch of this size after its first frame.
        """
        self.largest = largest
        found = np.concatenate(list(self._read(clips)) or [np.zeros((0, largest.numbers), np.float32)])
        if not len(found):
            raise InputError(
                f'the clips have no {largest.frames} frames of {largest.side}x{largest.side} pixels after the '
                'first one; give longer or larger ones.'
            )
        if len(found) > PATCHES:
            found = found[np.random.default_rng(0).choice(len(found), PATCHES, replace=False)]
        self.color = found.reshape(-1, 3).mean(axis=0)
        found = found - np.tile(self.color, largest.numbers // 3)
        self.covariance = found.T @ found / len(found)
        self._components: dict[Patch, tuple[np.ndarray, np.ndarray]] = {}

    def _read(self, clips: Source) -> Iterator[Float[np.ndarray, 'N P']]:
        frames, side = self.largest
        for index in range(min(CLIPS, len(clips))):
            video = np.asarray(clips[index]['video'])
            count, rows, columns = (video.shape[0] - 1) // frames, video.shape[1] // side, video.shape[2] // side
            video = video[1 : 1 + count * frames, : rows * side, : columns * side]
            video = video.reshape(count, frames, rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3, 5, 6)
            yield video.reshape(-1, self.largest.numbers).astype(np.float32) / 127.5 - 1

    def basis(self, patch: Patch, channels: int) -> Basis:
        """Return the first components of a patch, at most one per channel."""
        if patch not in self._components:
            self._components[patch] = self._decompose(patch)
        energy, rows = self._components[patch]
        kept = min(channels, patch.numbers)
        return Basis(patch, rows[:, ::-1][:, :kept].T, np.maximum(energy[::-1][:kept], LEAST))

    def _decompose(self, patch: Patch) -> tuple[np.ndarray, np.ndarray]:
        """Return the eigenvalues, ascending, and the eigenvectors of the covariance of a patch."""
        frames, side = self.largest
        outer = (frames // patch.frames, side // patch.side)
        shape = (outer[0], patch.frames, outer[1], patch.side, outer[1], patch.side, 3)
        # Average the diagonal blocks: the mean over all positions of this patch within the largest one.
        within = np.einsum('aibjckuaxbyczv->ijkuxyzv', self.covariance.reshape(*shape, *shape))
        within = within.reshape(patch.numbers, patch.numbers) / (outer[0] * outer[1] ** 2)
        if not within.any():  # blank clips, from which a plan takes shapes only
            return np.zeros(patch.numbers), np.eye(patch.numbers)
        return np.linalg.eigh(within)


def _parts(basis: Basis, grid: Patch) -> list[Float[np.ndarray, 'K p']]:
    """Return the rows restricted to each sub-patch of a grid, in the order of the grid."""
    patch, (frames, side) = basis.patch, grid
    inner = (patch.frames // frames, patch.side // side)
    rows = basis.rows.reshape(-1, frames, inner[0], side, inner[1], side, inner[1], 3)
    rows = rows.transpose(1, 3, 5, 0, 2, 4, 6, 7)
    return list(rows.reshape(frames * side**2, len(basis.rows), -1))


def _maps(small: Basis, large: Basis, grid: Patch) -> list[Float[np.ndarray, 'L K']]:
    """Return the maps from each sub-patch's components (K) to their contribution to the patch's components (L)."""
    return [part @ small.rows.T * (large.gain / small.gain) for part in _parts(large, grid)]


class Pairs:
    """Channel layout before the last norm: each group has a constant, then components, each as a pair x, -x."""

    def __init__(self, components: int, channels: int, groups: int) -> None:
        """Assign components to channels, repeating them until the channels are full."""
        size = channels // groups
        constants = 1 if size >= 4 else 0
        self.sign = np.zeros((channels, components), np.float32)
        self.bias = np.zeros(channels, np.float32)
        turn = 0
        for group in range(groups):
            for pair in range(size // 2):
                first = group * size + 2 * pair
                if pair < constants:
                    # Scaled with the size of the group, so that its share of the norm does not depend on it.
                    self.bias[first : first + 2] = CONSTANT * math.sqrt(size / 2), -CONSTANT * math.sqrt(size / 2)
                else:
                    self.sign[first : first + 2, turn % components] = 1, -1
                    turn += 1
        self.size, self.groups = size, groups

    def back(self, energy: Float[np.ndarray, ' K']) -> Float[np.ndarray, 'K C']:
        """Return the map from silu(norm(channels)) to the components, given their mean square in the data."""
        square = (np.square(self.sign) @ energy + np.square(self.bias)).reshape(self.groups, self.size)
        norm = np.repeat(np.sqrt(square.mean(axis=1)), self.size)
        copies = np.abs(self.sign).sum(axis=0) / 2
        return (self.sign * norm[:, None] / np.maximum(copies, 1)).T


def principal_layers(config: PyramidFlowVAEConfig, clips: Source) -> dict[str, Any]:
    """Return parameters of `encoder` and `decoder` outside residual branches; zero where there is no component.

    Raises:
      InputError: the clips are smaller than one latent.
    """
    frames = 2 ** sum(config.encoder_temporal_down_sample)
    side = 2 ** sum(config.encoder_spatial_down_sample)
    patches = Patches(clips, Patch(frames, side))
    return {
        'encoder': traverse_util.unflatten_dict(_encoder(config, patches)),
        'decoder': traverse_util.unflatten_dict(_decoder(config, patches)),
    }


def _encoder(config: PyramidFlowVAEConfig, patches: Patches) -> Layers:
    """Return the encoder's layers. The first C outputs of the last layer are latents with a mean square of 1."""
    widths, width = config.encoder_block_out_channels, config.encoder_block_out_channels[0]
    basis, path = patches.basis(Patch(1, 1), width), ('conv_in',)
    colors = basis.gain * basis.rows
    layers: Layers = {path: _conv({(0, 0, 0): colors}, 3, width, -colors @ patches.color)}
    for level, features in enumerate(widths):
        steps = [('resnet_0', Patch(1, 1))] if config.encoder_layers_per_block[level] and features != width else []
        steps += [('halve_space', Patch(1, 2))] if config.encoder_spatial_down_sample[level] else []
        steps += [('halve_time', Patch(2, 1))] if config.encoder_temporal_down_sample[level] else []
        for name, grid in steps:
            large = patches.basis(Patch(basis.patch.frames * grid.frames, basis.patch.side * grid.side), features)
            maps = dict(zip(_places(grid), _maps(basis, large, grid), strict=True))
            skip = name == 'resnet_0'
            path = (f'down_{level}', name, 'skip') if skip else (f'down_{level}', name)
            layers[path] = (_pointwise if skip else _conv)(maps, width, features)
            basis, width = large, features
    pairs = Pairs(len(basis.rows), width, config.encoder_norm_num_groups)
    _pair(layers[path], pairs)
    latents = min(config.encoder_out_channels, len(basis.rows))
    back = pairs.back(basis.energy * basis.gain**2)[:latents]
    unit = 1 / (basis.gain * math.sqrt(float(basis.energy[:latents].mean())))
    layers['conv_out',] = _conv({(0, 0, 0): unit * back}, width, 2 * config.encoder_out_channels)
    return layers


def _decoder(config: PyramidFlowVAEConfig, patches: Patches) -> Layers:
    """Return the decoder's layers, for latents of a mean square of 1."""
    widths = config.decoder_block_out_channels[::-1]
    width, path = widths[0], ('conv_in',)
    # One component per input channel: this basis describes latents scaled to a mean square of 1.
    basis = patches.basis(patches.largest, min(config.encoder_out_channels, width))
    layers: Layers = {path: _conv({(0, 0, 0): np.eye(len(basis.rows))}, config.encoder_out_channels, width)}
    for level, features in enumerate(widths):
        steps = [('resnet_0', Patch(1, 1))] if config.decoder_layers_per_block[level] and features != width else []
        steps += [('double_space', Patch(1, 2))] if config.decoder_spatial_up_sample[level] else []
        steps += [('double_time', Patch(2, 1))] if config.decoder_temporal_up_sample[level] else []
        for name, grid in steps:
            small = patches.basis(Patch(basis.patch.frames // grid.frames, basis.patch.side // grid.side), features)
            # Transposed maps with inverted gains.
            maps = [part.T * (small.gain / basis.gain) ** 2 for part in _maps(small, basis, grid)]
            skip = name == 'resnet_0'
            path = (f'up_{level}', name, 'skip') if skip else (f'up_{level}', name)
            if skip:
                layers[path] = _pointwise({(0, 0, 0): maps[0]}, width, features)
            else:
                layers[path] = _conv({(0, 0, 0): _interleaved(maps, features)}, width, features * len(maps))
            basis, width = small, features
    pairs = Pairs(len(basis.rows), width, config.decoder_norm_num_groups)
    _pair(layers[path], pairs)
    back = basis.rows.T @ pairs.back(basis.energy * basis.gain**2) / basis.gain
    layers['conv_out',] = _conv({(0, 0, 0): back}, width, 3, patches.color)
    return layers


def _places(grid: Patch) -> list[tuple[int, int, int]]:
    """Return the offsets of the sub-patches: frames before the current one, and rows and columns after it."""
    sides = range(grid.side)
    return [(frame, row, column) for frame in range(1 - grid.frames, 1) for row in sides for column in sides]


def _conv(
    maps: Mapping[tuple[int, int, int], Float[np.ndarray, 'D C']],
    channels_in: int,
    channels: int,
    bias: Float[np.ndarray, ' D'] | None = None,
) -> Layer:
    """Return a causal convolution with the given maps at their offsets, and zeros elsewhere."""
    kernel, offset = np.zeros((3, 3, 3, channels_in, channels), np.float32), np.zeros(channels, np.float32)
    for (frame, row, column), matrix in maps.items():
        kernel[2 + frame, 1 + row, 1 + column, : matrix.shape[1], : matrix.shape[0]] = matrix.T
    if bias is not None:
        offset[: len(bias)] = bias
    return {'kernel': kernel, 'bias': offset}


def _pointwise(maps: Mapping[tuple[int, int, int], Float[np.ndarray, 'D C']], channels_in: int, channels: int) -> Layer:
    """Return a skip's convolution of 1x1 with the only map."""
    layer = _conv(maps, channels_in, channels)
    return {'kernel': layer['kernel'][-1, 1:2, 1:2], 'bias': layer['bias']}


def _interleaved(maps: Sequence[Float[np.ndarray, 'K L']], channels: int) -> Float[np.ndarray, 'D L']:
    """Return the maps of all sub-patches as one, in the channel order of the following depth-to-space step."""
    stacked = np.zeros((channels, len(maps), maps[0].shape[1]), np.float32)
    stacked[: len(maps[0])] = np.stack(maps, axis=1)
    return stacked.reshape(-1, maps[0].shape[1])


def _pair(layer: Layer, pairs: Pairs) -> None:
    """Change a layer's output to pairs x, -x, for every pixel or frame that it produces per input position."""
    kernel, (channels, components) = layer['kernel'], pairs.sign.shape
    kernel = kernel.reshape(*kernel.shape[:-1], channels, -1)[..., :components, :]
    paired = np.einsum('...kn,ck->...cn', kernel, pairs.sign)
    layer['bias'] = np.repeat(pairs.bias, paired.shape[-1])
    layer['kernel'] = paired.reshape(*layer['kernel'].shape)
