"""The player's NumPy arithmetic against the library's."""

import jax.numpy as jnp
import numpy as np
import pytest
from neodragon_phone import noise, pyramid
from neodragon_phone.errors import BundleError
from neodragon_phone.player import snr_db

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid import layout, portable_noise, stages


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(('seed', 'purpose', 'unit', 'stage'), [(0, 0, 0, 0), (7, 1, 2, 1), (2**64 - 1, 2, 0, 0)])
def test_noise_is_the_librarys_bit_for_bit(seed, purpose, unit, stage):
    stream = portable_noise.stream_of(purpose, unit, stage)
    expected = portable_noise.normals(seed, stream, 3 * 5 * 7).reshape(3, 5, 7)
    np.testing.assert_array_equal(noise.normals(seed, purpose, unit, stage, (3, 5, 7)), expected)


def test_both_refuse_the_same_seeds():
    for seed in (-1, 2**64):
        with pytest.raises(BundleError, match='2\\^64 - 1'):
            noise.normals(seed, 0, 0, 0, (2,))
        with pytest.raises(InputError, match='2\\^64 - 1'):
            portable_noise.normals(seed, 0, 2)


def test_purposes_have_the_same_numbers():
    names = ('INITIAL', 'BLOCK', 'POSTERIOR', 'PICTURE', 'PICTURE_STEP')
    assert [getattr(noise, name) for name in names] == [getattr(portable_noise, name) for name in names]


def test_halving_doubling_and_coloring_are_the_librarys():
    x = random(2, 8, 16, 3)
    np.testing.assert_allclose(pyramid.down(x, 2), stages.down(jnp.asarray(x), 2), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(pyramid.up(x), stages.up(jnp.asarray(x)))
    for gamma in (1 / 3, 0.2):
        expected = stages.color_noise(jnp.asarray(x), gamma)
        np.testing.assert_allclose(pyramid.color_noise(x, gamma), expected, rtol=1e-5, atol=1e-6)


def test_patches_are_the_librarys():
    frame = random(4, 6, 3)
    patches = pyramid.patchify(frame, 2)
    np.testing.assert_array_equal(patches, layout.patchify(jnp.asarray(frame)[None, None], 2)[0])
    np.testing.assert_array_equal(pyramid.unpatchify(patches, 2, 4, 6), frame)


def test_ratios_are_in_decibels():
    x = random(50)
    assert snr_db(x, x) == 300 and snr_db(x, x * np.nan) == -300 and snr_db(x * np.nan, x) == -300
    assert snr_db(x, 1.01 * x) == pytest.approx(40, abs=0.01)
