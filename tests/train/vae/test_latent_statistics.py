"""Normalization of the latents of a new encoder, against closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.models.vae import NEODRAGON, normalize, posterior_mean, posterior_sample
from support.goldens import relative_error
from support.vae_runs import native, random
from train.vae import latent_statistics as statistics


def some_moments() -> jax.Array:
    """Moments [3, 4, 5, 6, 2 x 16] whose means differ by frame, as an encoder's would."""
    rng = np.random.default_rng(0)
    mean = rng.normal(size=(3, 4, 5, 6, 16)) * 2 + 0.7
    mean[:, 0] = mean[:, 0] * 0.4 - 0.9
    return jnp.asarray(np.concatenate([mean, rng.normal(size=mean.shape) - 2], axis=-1).astype(np.float32))


def test_divergence_is_that_of_normalized_latents():
    """Against the closed form of KL(N(m, v) || N(shift, 1 / scale^2)), number by number."""
    moments = np.asarray(some_moments(), np.float64)
    mean, log_variance = np.split(moments, 2, axis=-1)
    total = 0.0
    for frame in range(mean.shape[1]):
        shift, scale = (NEODRAGON.shift, NEODRAGON.scale) if frame else (NEODRAGON.first_shift, NEODRAGON.first_scale)
        variance, prior = np.exp(log_variance[:, frame]), scale**-2
        square = (mean[:, frame] - shift) ** 2
        total += np.sum(np.log(prior / variance) / 2 + (variance + square) / (2 * prior) - 0.5)
    assert statistics.prior_divergence(some_moments()) == pytest.approx(total / mean.size, rel=1e-5)


def test_measured_moments_are_those_of_normalized_samples():
    moments = jnp.concatenate([some_moments()] * 40)
    noise = random(*moments.shape[:-1], 16)
    samples = np.asarray(normalize(posterior_sample(moments, noise)))
    want = [samples[:, :1].mean(), samples[:, :1].std(), samples[:, 1:].mean(), samples[:, 1:].std()]
    got = statistics.measure([moments[:50], moments[50:]])
    assert np.allclose(got, want, atol=0.01)
    with pytest.raises(InputError, match='9 frames or more'):
        statistics.measure([moments[:, :1]])
    with pytest.raises(InputError, match='no clips'):
        statistics.measure([])


def test_latents_that_fit_are_left_alone_and_others_are_brought_there():
    measured = statistics.NormalizedMoments(0.0, 1.0, 0.0, 1.0)
    assert np.allclose(statistics.fit(measured), (1.0, 0.0), atol=1e-6)
    # Both kinds moved by one affine map of latents, z -> 2.5 z + 0.4: its inverse brings both back.
    kinds = ((NEODRAGON.first_shift, NEODRAGON.first_scale), (NEODRAGON.shift, NEODRAGON.scale))
    moved = [value for shift, scale in kinds for value in ((2.5 * shift + 0.4 - shift) * scale, 2.5)]
    affine = statistics.fit(statistics.NormalizedMoments(*moved))
    assert np.allclose(affine, (0.4, -0.16), atol=1e-6)
    assert np.allclose(statistics.after(statistics.NormalizedMoments(*moved), affine), (0, 1, 0, 1), atol=1e-6)


def test_no_other_map_fits_better():
    measured = statistics.measure([some_moments()])

    def divergence(affine: statistics.Affine) -> float:
        m0, s0, m1, s1 = statistics.after(measured, affine)
        return m0**2 + s0**2 - np.log(s0**2) + m1**2 + s1**2 - np.log(s1**2)

    best = statistics.fit(measured)
    for scale, shift in ((1.02, 0.0), (0.98, 0.0), (1.0, 0.05), (1.0, -0.05), (1.02, 0.05), (0.98, -0.05)):
        assert divergence(best) < divergence(statistics.Affine(best.scale * scale, best.shift + shift))


def test_folding_moves_latents_and_keeps_reconstructions():
    module, params = native()
    video = jnp.clip(random(2, 17, 16, 16, 3), -1, 1)
    run = jax.jit(lambda params, method, x: module.apply({'params': params}, x, method=method), static_argnums=1)
    folded, record = statistics.fit_and_fold(params, lambda x: run(params, 'encode', x), [video])
    before, after = run(params, 'encode', video), run(folded, 'encode', video)
    want = record.affine.scale * posterior_mean(before) + record.affine.shift
    assert relative_error(posterior_mean(after), want) < 2e-5
    assert np.allclose(after[..., 16:], before[..., 16:] + 2 * np.log(record.affine.scale), atol=1e-5)
    one, other = (run(tree, 'decode', posterior_mean(x)) for tree, x in ((params, before), (folded, after)))
    assert relative_error(other, one) < 1e-4
    measured = statistics.measure([after])
    assert np.allclose(measured, record.after, atol=1e-4)
    miss = lambda moments: abs(np.log(moments.first_deviation)) + abs(np.log(moments.later_deviation))
    assert miss(measured) < miss(record.before)
