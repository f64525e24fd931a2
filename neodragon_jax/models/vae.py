"""Video VAE: a causal 3-D encoder and the TinyAEHV decoder, 8x8x8 compression to 16 channels.

`VideoVAE` holds the parameters and both directions; `CausalVAE` is the half that Pyramid-Flow's native VAE shares.
Around it, pure functions: the latents' normalization, the posterior, and encoding in chunks of time or tiles of space.

Legend: B batch, T frames, H W pixel grid, t latent frames, h w latent grid, C latent channels, M = 2C moments.
Source: Neodragon, arXiv 2511.06055; Pyramid-Flow, arXiv 2410.05954, section 3.4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.neodragon import CausalEncoderConfig, VideoVAEConfig
from neodragon_jax.models.causal_layers import CONTEXT
from neodragon_jax.models.vae_decoder import Decoder, Memories, memory_shapes
from neodragon_jax.models.vae_encoder import Encoder

LOG_VARIANCE_RANGE = (-30.0, 20.0)

Video = Float[Array, 'B T H W 3']
Latents = Float[Array, 'B t h w C']
Moments = Float[Array, 'B t h w M']

Config = TypeVar('Config', bound=CausalEncoderConfig)


@dataclasses.dataclass(frozen=True)
class LatentStatistics:
    """Mean and reciprocal standard deviation that normalize an encoder's latents.

    A video's first frame, which the encoder treats as a picture, has separate statistics.
    """

    first_shift: float
    first_scale: float
    shift: float
    scale: float


# The release of Neodragon, and Pyramid-Flow's, which differ for videos only by their scale.
NEODRAGON = LatentStatistics(first_shift=0.1490, first_scale=0.5430, shift=-0.2343, scale=0.3031)
PYRAMID_FLOW = LatentStatistics(first_shift=0.1490, first_scale=1 / 1.8415, shift=-0.2343, scale=1 / 3.0986)


class CausalVAE(nn.Module, Generic[Config]):
    """The causal encoder and the pointwise convolutions next to the latents; subclasses add the decoder."""

    config: Config
    dtype: Any = None

    def setup(self) -> None:
        moments = 2 * self.config.encoder_out_channels
        self.encoder = Encoder(self.config, self.dtype)
        self.quant_conv = nn.Conv(moments, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(self.config.encoder_out_channels, (1, 1), dtype=self.dtype)

    def __call__(self, video: Video) -> Video:
        """Return the reconstruction from the posterior mean."""
        return self.decode(posterior_mean(self.encode(video)))

    def encode(self, video: Video) -> Moments:
        """Encode whole clips in [-1, 1].

        Returns:
          moments: mean and log-variance (not clamped) along the last axis; t = (T - 1) / 8 + 1.
        Raises:
          InputError: the frames or pixels do not divide into latents.
        """
        _check_clip(self.config, video, first=True)
        if video.shape[1] > 1:
            return self.quant_conv(self.encoder(video))
        moments = self.quant_conv(self.encoder(video[:, 0]))
        return moments.reshape(moments.shape[0], 1, *moments.shape[1:])

    def encode_next(self, video: Video) -> Moments:
        """Encode the next chunk of a clip; the collection 'context' must be mutable. See `encode_chunked`."""
        _check_clip(self.config, video, first=CONTEXT not in self.variables)
        return self.quant_conv(self.encoder(video))

    def decode(self, latents: Latents) -> Video:
        """Decode whole clips of de-normalized latents."""
        raise NotImplementedError


class VideoVAE(CausalVAE[VideoVAEConfig]):
    """Asymmetric causal video VAE: `encode` to moments, `decode` to frames, `decode_step` latent by latent."""

    def setup(self) -> None:
        super().setup()
        self.decoder = Decoder(self.config, self.dtype)

    def decode(self, latents: Latents) -> Video:
        """Decode whole clips of de-normalized latents to 8 (t - 1) + 1 frames in [-1, 1] (not clamped)."""
        batch, _, height, width, _ = latents.shape
        frames, _ = self.decode_step(latents, self.init_memories(batch, height, width))
        # The first latent frame stands for one frame of the video, its last.
        return frames[:, frames.shape[1] // latents.shape[1] - 1 :]

    def decode_step(self, latents: Latents, memories: Memories) -> tuple[Video, Memories]:
        """Decode the next latents of a video, usually one, to 8 frames each.

        Args:
          latents: de-normalized; t = 1 gives the graph for a phone.
          memories: result of the previous call, or of `init_memories`.
        Returns:
          frames: in [-1, 1] (not clamped); the first 7 of a video are to be dropped.
          memories: the state for the next call.
        """
        batch, length, *grid = latents.shape
        phases, memories = self.decoder(self.post_quant_conv(latents.reshape(batch * length, *grid)), memories)
        frames = jnp.stack(phases, axis=1)  # B*t 8 H W 3
        return frames.reshape(batch, length * len(phases), *frames.shape[2:]), memories

    @nn.nowrap
    def init_memories(self, batch: int, height: int, width: int) -> Memories:
        """Return the decoder's state before the first latent of height x width: zeros."""
        shapes = memory_shapes(self.config, batch, height, width)
        return tuple(jnp.zeros(shape, self.dtype or jnp.float32) for shape in shapes)


def _check_clip(config: CausalEncoderConfig, video: Video, first: bool) -> None:
    """Raise InputError unless the clip divides into whole latents; the first latent of a video is one frame."""
    _, frames, height, width, _ = video.shape
    time = 2 ** sum(config.encoder_temporal_down_sample)
    space = 2 ** sum(config.encoder_spatial_down_sample)
    if frames < 1 or (frames - first) % time:
        raise InputError(f'video has {frames} frames; cut it to {time}k{" + 1" if first else ""} frames.')
    if height % space or width % space:
        raise InputError(f'video is {height}x{width}; resize or crop it to multiples of {space}.')


def _shift_and_scale(length: int, first_frame: bool, statistics: LatentStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Return the normalization of each latent frame, two arrays [t, 1, 1, 1]."""
    first = (np.arange(length) == 0) & first_frame
    shift = np.where(first, np.float32(statistics.first_shift), np.float32(statistics.shift))
    scale = np.where(first, np.float32(statistics.first_scale), np.float32(statistics.scale))
    return shift.reshape(-1, 1, 1, 1), scale.reshape(-1, 1, 1, 1)


def normalize(latents: Latents, first_frame: bool = True, statistics: LatentStatistics = NEODRAGON) -> Latents:
    """Scale latents to about unit variance, as the denoiser expects them.

    Args:
      latents: samples of the posterior.
      first_frame: whether index 0 of the time axis is the video's first frame.
      statistics: those of the encoder, and the ones that the denoiser was trained with.
    """
    shift, scale = _shift_and_scale(latents.shape[-4], first_frame, statistics)
    return (latents - shift) * scale


def denormalize(latents: Latents, first_frame: bool = True, statistics: LatentStatistics = NEODRAGON) -> Latents:
    """Invert `normalize`."""
    shift, scale = _shift_and_scale(latents.shape[-4], first_frame, statistics)
    return latents / scale + shift


def posterior_mean(moments: Moments) -> Latents:
    """Return the mean of the latent distribution."""
    return moments[..., : moments.shape[-1] // 2]


def posterior_sample(moments: Moments, noise: Latents) -> Latents:
    """Return mean + deviation * noise, with noise drawn from N(0, 1)."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean + jnp.exp(jnp.clip(log_variance, *LOG_VARIANCE_RANGE) / 2) * noise


@functools.partial(jax.jit, static_argnums=(0, 1))
def _next_chunk(
    model: CausalVAE, method: str, variables: Mapping[str, Any], chunk: Float[Array, 'B t _ _ _']
) -> tuple[Float[Array, 'B _ _ _ _'], Mapping[str, Any]]:
    """Run a method on one chunk; compiled once per model and shape."""
    return model.apply(variables, chunk, method=method, mutable=[CONTEXT])


def in_chunks(
    model: CausalVAE, method: str, params: Mapping[str, Any], clip: Float[Array, 'B T _ _ _'], window: int
) -> Float[Array, 'B t _ _ _']:
    """Run `encode_next` or `decode_next` over a clip: 1 + window frames (or latents) first, then window at a time."""
    starts = [0, *range(window + 1, clip.shape[1], window)]
    parts, context = [], {}
    for chunk in jnp.split(clip, starts[1:], axis=1):
        part, context = _next_chunk(model, method, {'params': params, **context}, chunk)
        parts.append(part)
    return jnp.concatenate(parts, axis=1)


def encode_chunked(model: CausalVAE, params: Mapping[str, Any], video: Video, window: int = 16) -> Moments:
    """Encode a long clip in chunks of `window` frames after the first one; equal to encoding it whole.

    Every causal convolution keeps the frames that its next window needs, so peak memory is that of one chunk.

    Args:
      window: frames of a chunk, a multiple of 8.
    Raises:
      InputError: the window, the frames or the pixels do not divide into latents.
    """
    time = 2 ** sum(model.config.encoder_temporal_down_sample)
    if window < 1 or window % time:
        raise InputError(f'window is {window} frames; use a positive multiple of {time}.')
    _check_clip(model.config, video, first=True)
    return in_chunks(model, 'encode_next', params, video, window)


def encode_tiled(
    encode: Callable[[Video], Moments], video: Video, tile: int = 256, overlap: int = 64, factor: int = 8
) -> Moments:
    """Encode a large picture or clip in overlapping tiles and cross-fade the seams: an approximation.

    Args:
      encode: any implementation of `VideoVAE.encode`; it is given at most tile x tile pixels.
      tile: pixels of a tile's side.
      overlap: pixels that a tile shares with the one before it.
      factor: pixels of a latent's side.
    Raises:
      InputError: the tiles do not start at whole latents.
    """
    if not 0 <= overlap < tile or tile % factor or overlap % factor:
        raise InputError(f'tile {tile} with overlap {overlap} does not fit; use multiples of {factor}, overlap < tile.')
    height, width = video.shape[2:4]
    if max(height, width) <= tile:
        return encode(video)
    stride, fade = tile - overlap, overlap // factor
    above: list[Moments] = []
    strips = []
    for top in range(0, height, stride):
        row: list[Moments] = []
        for column, left in enumerate(range(0, width, stride)):
            part = encode(video[:, :, top : top + tile, left : left + tile])
            part = _cross_fade(above[column], part, fade, axis=2) if above else part
            row.append(_cross_fade(row[-1], part, fade, axis=3) if row else part)
        kept = [part[:, :, : stride // factor, : stride // factor] for part in row]
        strips.append(jnp.concatenate(kept, axis=3))
        above = row
    return jnp.concatenate(strips, axis=2)


def _cross_fade(before: Float[Array, 'B t _ _ M'], tile: Moments, length: int, axis: int) -> Moments:
    """Fade from the last `length` latents of the tile before to the first ones of this tile."""
    length = min(length, before.shape[axis], tile.shape[axis])
    weight = np.linspace(0, 1, length, endpoint=False, dtype=np.float32).reshape(-1, *[1] * (tile.ndim - 1 - axis))
    end = jnp.split(before, [before.shape[axis] - length], axis=axis)[1]
    start, rest = jnp.split(tile, [length], axis=axis)
    return jnp.concatenate([end * (1 - weight) + start * weight, rest], axis=axis)
