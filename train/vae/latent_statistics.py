"""Normalization of a new encoder's latents to the mean and deviation that `neodragon_jax.models.vae.normalize` assumes.

All later programs normalize latents with the constants of the release, one pair for first and one for later frames:

    normalized = (z - shift_k) scale_k,    k = first, later

A new encoder's latents have other moments. Two measures correct them. During training, the prior is N(0, 1) of
normalized latents (`prior_divergence`). After training, `fold` puts one affine map z -> a z + b into the pointwise
convolutions next to the latents: the map into quant_conv, its inverse into post_quant_conv, so that reconstructions do
not change. One map cannot fit both kinds of frames exactly; `fit` chooses the a and b that minimize

    sum over k of KL(N(m_k, s_k^2) || N(0, 1)) = 1/2 sum over k of (m_k^2 + s_k^2 - 1 - log s_k^2)

with m_k and s_k the mean and deviation of normalized latents after the map. Both kinds have equal weight, because the
first frame is a unit of its own for a denoiser. `NormalizedMoments` holds the moments that remain.

Legend: B clips, T H W frames and pixels, t latent frames, h w latent grid, C latent channels, M = 2C moments.
Source: Neodragon, arXiv 2511.06055; Pyramid-Flow, arXiv 2410.05954.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from neodragon_jax.base.errors import InputError
from neodragon_jax.models.vae import LOG_VARIANCE_RANGE, NEODRAGON, LatentStatistics, Moments, normalize, posterior_mean

Params = Mapping[str, Any]


class NormalizedMoments(NamedTuple):
    """Mean and deviation of normalized latents; a denoiser expects 0, 1, 0, 1."""

    first_mean: float
    first_deviation: float
    later_mean: float
    later_deviation: float


class Affine(NamedTuple):
    """The map z -> scale z + shift of latents before normalization."""

    scale: float
    shift: float


def prior_divergence(moments: Moments, statistics: LatentStatistics = NEODRAGON) -> Float[Array, '']:
    """Return KL(posterior || prior) in nats per number, the prior N(0, 1) of normalized latents; in float32."""
    moments = moments.astype(jnp.float32)
    mean, log_variance = normalize(posterior_mean(moments), statistics=statistics), _log_variance(moments, statistics)
    return jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance) / 2


def _log_variance(moments: Moments, statistics: LatentStatistics) -> Float[Array, 'B t h w C']:
    """Return the log-variance of normalized latents."""
    length, channels = moments.shape[-4], moments.shape[-1] // 2
    scale = np.where(np.arange(length) == 0, statistics.first_scale, statistics.scale).reshape(-1, 1, 1, 1)
    return jnp.clip(moments[..., channels:], *LOG_VARIANCE_RANGE) + 2 * np.log(scale).astype(np.float32)


def measure(
    moments: Iterable[Float[np.ndarray, 'B t h w M']], statistics: LatentStatistics = NEODRAGON
) -> NormalizedMoments:
    """Return the moments of normalized latents, samples of the posterior, over clips from their first frame on.

    The moments are taken over all channels and positions together, as for the constants of the release.

    Args:
      moments: the encoder's moments, batch by batch; t at least 2.
    Raises:
      InputError: there are no clips, or only single pictures, which have no later frames.
    """
    counts, sums, squares = np.zeros(2), np.zeros(2), np.zeros(2)
    for batch in moments:
        if batch.shape[1] < 2:
            raise InputError('statistics of latents: the clips are single pictures; give clips of 9 frames or more.')
        batch = jnp.asarray(batch, jnp.float32)
        mean = np.asarray(normalize(posterior_mean(batch), statistics=statistics), np.float64)
        variance = np.exp(np.asarray(_log_variance(batch, statistics), np.float64))
        for kind, frames in enumerate((slice(0, 1), slice(1, None))):
            counts[kind] += mean[:, frames].size
            sums[kind] += mean[:, frames].sum()
            # E[sample^2] = mean^2 + variance.
            squares[kind] += (mean[:, frames] ** 2 + variance[:, frames]).sum()
    if not counts.all():
        raise InputError('statistics of latents: there are no clips to measure; give some.')
    means = sums / counts
    deviations = np.sqrt(squares / counts - means**2)
    return NormalizedMoments(*(float(x) for pair in zip(means, deviations, strict=True) for x in pair))


def fit(measured: NormalizedMoments, statistics: LatentStatistics = NEODRAGON) -> Affine:
    """Return the map of latents that minimizes the sum of divergences in the module's docstring.

    The sum is quadratic in b. With the best b it is square a^2 + linear a - 2 log a, up to a constant.
    """
    scales = np.array([statistics.first_scale, statistics.scale])
    shifts = np.array([statistics.first_shift, statistics.shift])
    normalized = np.array(measured).reshape(2, 2)
    means, deviations = normalized[:, 0] / scales + shifts, normalized[:, 1] / scales
    # The best b is the mean of shift_k - a mean_k, weighted by the squares of the scales.
    weights = scales**2 / np.sum(scales**2)
    from_mean = lambda values: values - weights @ values
    slope, offset = from_mean(means) * scales, from_mean(shifts) * scales  # m_k = slope_k a - offset_k
    square = np.sum((deviations * scales) ** 2) / 2 + slope @ slope / 2
    linear = -(slope @ offset)
    # Its derivative vanishes where 2 square a^2 + linear a - 2 = 0.
    scale = (-linear + math.sqrt(linear**2 + 16 * square)) / (4 * square)
    return Affine(float(scale), float(weights @ (shifts - scale * means)))


def after(measured: NormalizedMoments, affine: Affine, statistics: LatentStatistics = NEODRAGON) -> NormalizedMoments:
    """Return the moments of normalized latents once a map is folded in."""
    mapped = []
    kinds = (statistics.first_shift, statistics.first_scale), (statistics.shift, statistics.scale)
    for (shift, scale), (mean, deviation) in zip(kinds, (measured[:2], measured[2:]), strict=True):
        mapped += [(affine.scale * (mean / scale + shift) + affine.shift - shift) * scale, affine.scale * deviation]
    return NormalizedMoments(*mapped)


def fold(params: Params, affine: Affine) -> dict[str, Any]:
    """Return parameters of a CausalVAE whose latents are mapped and whose reconstructions are unchanged.

    Means become a mean + b, log-variances grow by 2 log a, and post_quant_conv includes the inverse map. Both
    convolutions are pointwise, so the result is exact up to rounding, except for log-variances that leave their clamp.
    """
    quant, post = ({name: np.asarray(leaf) for name, leaf in params[key].items()} for key in _NEXT_TO_LATENTS)
    channels = quant['bias'].shape[0] // 2
    gain = np.r_[np.full(channels, affine.scale), np.ones(channels)].astype(quant['kernel'].dtype)
    offset = np.r_[np.full(channels, affine.shift), np.full(channels, 2 * math.log(affine.scale))]
    quant = {'kernel': quant['kernel'] * gain, 'bias': (quant['bias'] * gain + offset).astype(quant['bias'].dtype)}
    kernel = post['kernel'] / np.asarray(affine.scale, post['kernel'].dtype)
    shift = affine.shift * kernel.sum(axis=(0, 1, 2))  # of [1, 1, in, out]
    post = {'kernel': kernel, 'bias': (post['bias'] - shift).astype(post['bias'].dtype)}
    return {**params, **dict(zip(_NEXT_TO_LATENTS, (quant, post), strict=True))}


_NEXT_TO_LATENTS = 'quant_conv', 'post_quant_conv'


@dataclasses.dataclass(frozen=True)
class Folded:
    """The map that `fit_and_fold` chose, and the moments before and after it."""

    affine: Affine
    before: NormalizedMoments
    after: NormalizedMoments

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as JSON."""
        return {
            name: {key: round(value, 6) for key, value in getattr(self, name)._asdict().items()}
            for name in ('affine', 'before', 'after')
        }


def fit_and_fold(
    params: Params, encode: Callable[[Array], Moments], videos: Iterable[Array]
) -> tuple[dict[str, Any], Folded]:
    """Measure the latents of clips, and return the parameters with the best map folded in.

    Args:
      params: parameters of a CausalVAE.
      encode: the encoder with these parameters, from clips [B, T, H, W, 3] in [-1, 1] to moments.
      videos: batches of representative clips; more clips give better estimates, and 16 are enough.
    """
    before = measure(np.asarray(encode(video)) for video in videos)
    affine = fit(before)
    return fold(params, affine), Folded(affine, before, after(before, affine))
