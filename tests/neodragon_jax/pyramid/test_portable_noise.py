"""Tests of portable noise: published vectors of its generator, vectors shared with other languages, distribution."""

import hashlib
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid import portable_noise
from neodragon_jax.pyramid.portable_noise import (
    BLOCK,
    INITIAL,
    POSTERIOR,
    PortableNoise,
    PortablePictureNoise,
    normals,
    stream_of,
    threefry,
)
from neodragon_jax.pyramid.sampler import NoiseSource, Plan, Prompt, sample
from neodragon_jax.pyramid.schedule import Schedule
from neodragon_jax.pyramid.stages import color_noise
from support.goldens import ROOT

PAGE = (ROOT / 'docs' / 'bundle.md').read_text()


# Key, counter, result: known-answer tests of the Random123 library, file kat_vectors, threefry2x32 with 20 rounds.
@pytest.mark.parametrize(
    ('key', 'counter', 'result'),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_published_vectors(key, counter, result):
    words = threefry(key, *(np.array([word], np.uint32) for word in counter))
    assert tuple(int(word[0]) for word in words) == result


# Seed, stream, the first three numbers, SHA-256 of the first 10,001 as little-endian float32.
VECTORS = [
    (
        0,
        stream_of(INITIAL),
        'c6f5a6bf 6e424f3e 90ab86bf',
        '4ef19a5e3612655d892d54b6b185fdd3fa3bddf49feb3f95181553f911f4d047',
    ),
    (
        7,
        stream_of(BLOCK, 2, 1),
        'cc7f153f 3bfd41c0 c9e59d3f',
        'd78d751128f821c7042e85eb4e3bd1f0826a9f4b8bfe405333731e470fd69e64',
    ),
    (
        2**64 - 1,
        stream_of(POSTERIOR),
        'dd6d0b3e 2a418cbf 4ca31d3f',
        'cfc0a1a4fb43d54ad602bb1660fc4221cdfab13ef1b8db7bcfd7eacf0050040a',
    ),
]


@pytest.mark.parametrize(('seed', 'stream', 'first', 'digest'), VECTORS)
def test_normals_are_the_test_vectors(seed, stream, first, digest):
    numbers = normals(seed, stream, 10_001).astype('<f4')
    assert numbers[:3].tobytes().hex(' ', 4) == first
    assert hashlib.sha256(numbers.tobytes()).hexdigest() == digest
    np.testing.assert_array_equal(numbers[:5], normals(seed, stream, 5))


def page_rows(columns: int) -> list[list[str]]:
    """Return the rows of hexadecimal numbers in the tables of docs/bundle.md with a number of columns."""
    rows = [line.strip('| ').split(' | ') for line in PAGE.splitlines() if line.startswith('|')]
    return [row for row in rows if len(row) == columns and re.fullmatch(r'[0-9a-f]{8}( [0-9a-f]{8})+', row[-1])]


def test_the_page_of_the_bundle_has_the_vectors():
    """An engineer has the page, not the code."""
    words = lambda text: [int(word, 16) for word in text.split()]
    generator, numbers = ([row for row in page_rows(3) if (' ' in row[0]) == is_key] for is_key in (True, False))
    assert len(generator) == len(numbers) == 3
    for key, counter, result in generator:
        first, second = words(key)
        found = threefry((first, second), *(np.array([word], np.uint32) for word in words(counter)))
        assert [int(word[0]) for word in found] == words(result)
    for seed, stream, first in numbers:
        found = normals(int(seed), stream_of(*map(int, stream.split(', '))), 3)
        assert found.astype('<f4').tobytes().hex(' ', 4) == first


def test_the_page_of_the_bundle_has_the_pseudo_code():
    _, start, rest = str(portable_noise.__doc__).partition('    normals(seed')
    assert f'```\n{textwrap.dedent(start + rest).strip()}\n```' in PAGE


def test_normals_are_the_exact_box_muller_transform():
    count, stream = 100_000, stream_of(INITIAL, 3)
    index = np.arange(count // 2, dtype=np.uint32)
    a, b = (word.astype(np.float64) for word in threefry((11, 0), index, np.full_like(index, stream)))
    radius, angle = np.sqrt(-2 * np.log((2 * a + 1) / 2**33)), 2 * np.pi * (b + 0.5) / 2**32 - np.pi / 4
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    np.testing.assert_allclose(normals(11, stream, count), expected, rtol=1e-6, atol=1e-7)


def test_normals_have_the_moments_of_a_normal_law():
    numbers = normals(1, stream_of(INITIAL), 400_000).astype(np.float64)
    moments = [np.mean(numbers**power) for power in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.03)


def test_streams_and_seeds_are_unrelated():
    draws = [normals(seed, stream_of(*stream), 20_000) for seed in (0, 1) for stream in ((0, 0), (0, 1), (1, 1, 1))]
    assert np.abs(np.corrcoef(draws) - np.eye(len(draws))).max() < 0.04


def test_a_sample_does_not_depend_on_its_batch_or_on_the_length_of_the_video():
    many, one = PortableNoise([5, 9]), PortableNoise([9])
    np.testing.assert_array_equal(many.initial((2, 3, 4, 8, 2))[1], one.initial((1, 3, 4, 8, 2))[0])
    np.testing.assert_array_equal(one.initial((1, 3, 4, 8, 2)), one.initial((1, 5, 4, 8, 2))[:, :3])
    np.testing.assert_array_equal(many.block(2, 1, (2, 1, 4, 8, 2))[1], one.block(2, 1, (1, 1, 4, 8, 2))[0])


def test_block_noise_is_the_colored_stream():
    white = normals(4, stream_of(BLOCK, 1, 2), 64).reshape(1, 1, 4, 8, 2)
    np.testing.assert_array_equal(PortableNoise([4]).block(1, 2, white.shape), color_noise(jnp.asarray(white)))


def test_pictures_have_streams_of_their_own():
    noise, shape = PortablePictureNoise([3]), (1, 4, 4, 2)
    draws = [noise.initial(shape), noise.step(0, shape), noise.step(1, shape), PortableNoise([3]).posterior(shape)]
    assert len({np.asarray(draw).tobytes() for draw in draws}) == len(draws)


def test_the_sampler_takes_portable_noise():
    plan = Plan(frames=2, height=8, width=8, channels=2)
    noise = PortableNoise([0], plan.schedule)
    assert isinstance(noise, NoiseSource)
    prompt = Prompt(jnp.zeros((1, 1, 1)), jnp.ones((1, 1), jnp.int32), jnp.zeros((1, 1)))
    still = sample(lambda stage, history, x, *_: jnp.zeros_like(x), plan, prompt, noise)
    again = sample(lambda stage, history, x, *_: jnp.zeros_like(x), plan, prompt, PortableNoise([0], Schedule()))
    np.testing.assert_array_equal(jax.device_get(still), jax.device_get(again))
    assert float(jnp.std(still)) > 0.5


@pytest.mark.parametrize('seed', [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(InputError, match='0 to 2\\^64 - 1'):
        normals(seed, 0, 2)
