"""Training clips of a video autoencoder, stored or drawn on the fly, and random cuts of them.

Legend: B batch, T frames, H W pixels, V held-out clips; t h w of a cut.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from neodragon_jax.base.errors import InputError, did_you_mean
from train.data import SampleSource, Source
from train.data.clip_source import ClipSource
from train.data.sources import Repeated, hold_out
from train.runtime.sharding import split_batch
from train.shapes import attributes
from train.shapes.source import MovingShapesSource
from train.shapes.world import WORLDS

Reader = Callable[[int, UInt8[np.ndarray, 't h w 3']], dict[str, float]]

# Prefix of `data` for drawn scenes: 'shapes:cpu'.
DRAWN = 'shapes:'
# Smallest side in pixels at which attributes are legible.
SMALLEST_READ = 32
# Number of different drawn scenes.
SCENES = 2**16


@dataclasses.dataclass(frozen=True)
class ClipsConfig:
    """Size of the training cuts, and the number of held-out clips.

    Attributes:
      frames: frames of a cut, 8 n + 1.
      height, width: pixels of a cut; drawn clips have this size.
      held_out: V, clips excluded from training: the last stored ones, or drawn ones with unseen captions.
    """

    frames: int = 17
    height: int = 256
    width: int = 256
    held_out: int = 8

    def __post_init__(self) -> None:
        for name in ('frames', 'height', 'width', 'held_out'):
            if getattr(self, name) < 1:
                raise InputError(f'{name} is {getattr(self, name)}; it must be at least 1.')
        if self.frames % 8 != 1:
            raise InputError(f'frames is {self.frames}; the VAE takes 8 n + 1, such as 17.')

    @property
    def size(self) -> tuple[int, int, int]:
        """(t, h, w)."""
        return self.frames, self.height, self.width


class Clips(NamedTuple):
    """Samples to train on, held-out clips to evaluate, and JSON that identifies both.

    Attributes:
      read: (index of a held-out clip, its reconstruction) -> the attributes that are still right, where they are known.
    """

    training: Source
    held_out: UInt8[np.ndarray, 'V t h w 3']
    metadata: dict[str, Any]
    read: Reader | None = None


class Videos:
    """The videos of a source, without its other fields, as a `Source` of {'video': uint8 [T, H, W, 3]}."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        return {'video': self._source[index]['video']}


def open_clips(data: str, config: ClipsConfig, seed: int = 0) -> Clips:
    """Open the clips of the setting `data`.

    Args:
      data: a sample set of train.captioned_clips or train.moving_shapes; or 'shapes:WORLD', scenes of that world that
        are drawn when they are read.
      seed: seed of the drawn scenes.
    Raises:
      InputError: there is no such world or folder, or its clips are smaller than a cut.
    """
    read = None
    if data.startswith(DRAWN):
        world = data.removeprefix(DRAWN)
        if world not in WORLDS:
            raise InputError(f'data is {data!r}; drawn worlds are {_worlds()}.{did_you_mean(world, WORLDS)}')
        size = config.height, config.width
        source = MovingShapesSource(WORLDS[world], config.frames, size, seed, SCENES)
        held_out = MovingShapesSource(WORLDS[world], config.frames, size, seed, config.held_out, 'held_out')
        metadata = {'drawn': source.metadata()}
        read = functools.partial(_read_attributes, held_out)
    else:
        whole, protocol = _stored(data)
        source, held_out = hold_out(whole, config.held_out, setting=f'config.clips.held_out, {data}')
        metadata = {'protocol': protocol, 'clips': len(whole)}
    stored = np.asarray(source[0]['video']).shape[:3]
    if any(have < want for have, want in zip(stored, config.size, strict=True)):
        have, want = ('{} frames of {}x{}'.format(*size) for size in (stored, config.size))
        raise InputError(f'{data}: its clips are {have}, a cut is {want}; choose a smaller cut, or other clips.')
    cuts = np.stack([middle_cut(held_out[index]['video'], config) for index in range(config.held_out)])
    return Clips(Videos(source), cuts, metadata | {'cut': list(config.size), 'held_out': config.held_out}, read)


def _read_attributes(scenes: MovingShapesSource, index: int, video: UInt8[np.ndarray, 't h w 3']) -> dict[str, float]:
    """Return 1 or 0 for each attribute, right or wrong, and the shape mismatch; {} if the picture is too small."""
    if min(video.shape[1:3]) < SMALLEST_READ:
        return {}
    found = attributes.measure(video, scenes.scene(index).traits, scenes.world)
    return {f'{name}_right': float(right) for name, right in found.correct().items()} | {'mismatch': found.mismatch}


def blank_clips(config: ClipsConfig) -> Clips:
    """Return clips of zeros, for a dry run without data."""
    blank = np.zeros((*config.size, 3), np.uint8)
    return Clips(Repeated({'video': blank}, SCENES), blank[None], {})


def random_cuts(videos: UInt8[Array, 'B T H W 3'], config: ClipsConfig, key: PRNGKeyArray) -> Float[Array, 'B t h w 3']:
    """Return a cut of every clip at a random time and place, in [-1, 1]."""
    free = np.array(videos.shape[1:4]) - config.size
    if free.any():
        starts = jax.random.randint(key, (videos.shape[0], 3), 0, free + 1)
        cut = lambda video, start: jax.lax.dynamic_slice(video, (*start, 0), (*config.size, 3))
        videos = split_batch(jax.vmap(cut)(videos, starts))
    return to_float(videos)


def middle_cut(video: UInt8[np.ndarray, 'T H W 3'], config: ClipsConfig) -> UInt8[np.ndarray, 't h w 3']:
    """Return the center crop of the first frames."""
    top, left = ((have - want) // 2 for have, want in zip(video.shape[1:3], config.size[1:], strict=True))
    return video[: config.frames, top : top + config.height, left : left + config.width]


def to_float(videos: UInt8[Array, '*S 3']) -> Float[Array, '*S 3']:
    """Return bytes as numbers in [-1, 1]."""
    return videos.astype(jnp.float32) / 127.5 - 1


def _stored(folder: str) -> tuple[Source, dict[str, Any]]:
    """Return the samples of a folder of videos, and their protocol."""
    samples = SampleSource(folder)
    if 'video' in samples.spec.blobs:
        return ClipSource(folder), samples.protocol
    if 'video' in samples.spec.arrays:
        return samples, samples.protocol
    raise InputError(
        f'{folder}: its samples hold {", ".join(samples.spec.names())}, but no videos; pass a folder of '
        f'train.captioned_clips or train.moving_shapes, or draw: {_worlds()}.'
    )


def _worlds() -> str:
    return ', '.join(DRAWN + name for name in WORLDS)
