"""Mixtures: all samples appear, in the given shares, deterministically; pictures are padded; captions are dropped."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from train.data import ArraySpec, RecordSpec, SampleSource, SampleWriter
from train.data.mixture import Mixture, drop_captions
from train.data.sources import hold_out, identity
from train.runtime.loader import Loader
from train.runtime.sharding import MeshConfig, batch_sharding, make_mesh


class Numbers:
    """`count` samples of T latents that identify their source."""

    def __init__(self, count: int, frames: int, tag: int, **more) -> None:
        self._count, self._frames, self._tag, self._more = count, frames, tag, more

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict:
        latents = np.full((self._frames, 2, 2, 4), self._tag * 1000 + index + 1, ml_dtypes.bfloat16)
        return {'index': index, 'prompt': f'{self._tag}', 'latents': latents, 'text': np.zeros((3, 5))} | self._more


def places(mixture: Mixture) -> collections.Counter:
    return collections.Counter(mixture.origin(index) for index in range(len(mixture)))


def test_a_round_shows_everything_in_the_given_shares():
    mixture = Mixture([Numbers(40, 3, 1), Numbers(7, 1, 2), Numbers(5, 3, 3)], [4, 1, 2])
    assert mixture.counts == [40, 10, 20]
    assert len(mixture) == 70
    shown = places(mixture)
    assert {shown[0, place] for place in range(40)} == {1}
    assert {shown[2, place] for place in range(5)} == {4}
    # The second source is shown once whole, and three of its samples again.
    assert sorted(shown[1, place] for place in range(7)) == [1, 1, 1, 1, 2, 2, 2]


def test_the_seed_decides_what_is_shown_again():
    sources = [Numbers(100, 3, 1), Numbers(40, 3, 2)]
    again = lambda seed: {place for place, times in places(Mixture(sources, [2, 1], seed)).items() if times == 2}
    assert again(0) == again(0)
    assert len(again(0)) == 10
    assert again(0) != again(1)
    assert Mixture(sources, [0.2, 0.1]).counts == Mixture(sources, [2, 1]).counts == [100, 50]


def test_pictures_are_padded_to_the_length_of_videos():
    mixture = Mixture([Numbers(4, 3, 1), Numbers(4, 1, 2)], [1, 1])
    video, picture = mixture[1], mixture[6]
    assert video['latents'].shape == picture['latents'].shape == (3, 2, 2, 4)
    assert picture['latents'].dtype == ml_dtypes.bfloat16
    assert (int(video['units']), int(picture['units'])) == (3, 1)
    np.testing.assert_array_equal(picture['latents'][0].astype(float), Numbers(4, 1, 2)[2]['latents'][0])
    assert not picture['latents'][1:].any()
    assert (int(picture['source']), picture['index'], picture['prompt']) == (1, 6, '2')
    assert mixture.spec.latents == (3, 2, 2, 4)
    assert set(mixture.spec.arrays) == {'latents', 'text', 'units', 'source'}
    # The units of a source that has them are kept.
    assert int(Mixture([Numbers(4, 3, 1, units=np.int32(2))], [1])[0]['units']) == 2


def test_the_loader_takes_mixtures_and_resumes_them():
    mixture = Mixture([Numbers(24, 3, 1), Numbers(10, 1, 2)], [3, 1], seed=5)
    sharding = batch_sharding(make_mesh(MeshConfig(8, 1, 1)))
    loader = Loader(mixture, sharding, batch_size=8, seed=1)
    batches = [next(loader) for _ in range(9)]
    seen = collections.Counter(int(value) for batch in batches for value in np.asarray(batch['source']))
    assert seen.total() == 72
    assert abs(seen[1] / seen.total() - 0.25) < 0.08
    for batch in batches:
        latents, units = np.asarray(batch['latents'], np.float32), np.asarray(batch['units'])
        np.testing.assert_array_equal(units, np.where(np.asarray(batch['source']) == 1, 1, 3))
        np.testing.assert_array_equal((latents != 0).all(axis=(2, 3, 4)).sum(axis=1), units)
    loader.close()
    again = Loader(mixture, sharding, batch_size=8, seed=1)
    for _ in range(4):
        next(again)
    state = again.get_state()
    again.close()
    third = Loader(mixture, sharding, batch_size=8, seed=1)
    third.set_state(state)
    np.testing.assert_array_equal(np.asarray(next(third)['index']), np.asarray(batches[4]['index']))
    third.close()


@pytest.mark.parametrize(
    ('sources', 'weights', 'message'),
    [
        ([], [], '0 sources and 0 weights'),
        ([Numbers(2, 1, 1)], [1, 2], '1 sources and 2 weights'),
        ([Numbers(2, 1, 1)], [0], r'weights are \[0\]; give positive'),
        ([Numbers(2, 1, 1)], [float('nan')], 'give positive'),
        ([Numbers(0, 1, 1)], [1], 'a source is empty'),
        ([Numbers(2, 1, 1), Numbers(2, 1, 1, text=np.zeros((4, 5)))], [1, 1],
         r'text is float64 \[3, 5\] in source 0, float64 \[4, 5\] in source 1'),
        ([Numbers(2, 1, 1), Numbers(2, 1, 1, extra=np.zeros(1))], [1, 1],
         r'extra is absent in source 0, float64 \[1\]'),
        ([Numbers(2, 1, 1), Numbers(2, 1, 1, latents=np.zeros((1, 2, 3, 4)))], [1, 1],
         r'latents are bfloat16 .*frames only'),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(sources, weights, message):
    with pytest.raises(InputError, match=message):
        Mixture(sources, weights)


def stored(folder, frames: int, adapter: str, null: float) -> SampleSource:
    """Write two samples with conditionings."""
    spec = RecordSpec({'latents': ArraySpec((frames, 2, 2, 4), 'bfloat16'), 'pooled': ArraySpec((3,), 'bfloat16')})
    with SampleWriter(folder, spec, 2, protocol={'adapter': adapter, 'frames': frames}) as writer:
        writer.write_conditioning('null', {'pooled': np.full(3, null)})
        writer.write_conditioning('negative', {'pooled': np.ones(3)})
        for index in range(2):
            writer.append({'index': index, 'prompt': 'x', 'latents': np.ones((frames, 2, 2, 4)), 'pooled': np.ones(3)})
    return SampleSource(folder)


def test_conditionings_and_protocol_are_those_that_all_share(tmp_path):
    video, picture, other = (stored(tmp_path / f'{n}', n, 'abc', null) for n, null in ((3, 0), (1, 0), (2, 5)))
    mixture = Mixture([video, picture], [1, 1])
    assert mixture.protocol == {'adapter': 'abc'}
    assert mixture.null()['pooled'].tolist() == [0, 0, 0]
    assert mixture.negative()['pooled'].tolist() == [1, 1, 1]
    with pytest.raises(InputError, match='the sources have different null conditionings'):
        Mixture([video, other], [1, 1]).null()
    assert mixture.metadata() == Mixture([video, picture], [1, 1]).metadata()
    assert mixture.metadata() != Mixture([video, other], [1, 1]).metadata()


@pytest.mark.parametrize('leading', [(4000,), (2, 2000)])
def test_captions_drop_whole_and_as_often_as_asked(leading):
    rng = np.random.default_rng(0)
    batch = {
        'latents': jnp.ones((*leading, 1)),
        'text': jnp.asarray(rng.normal(size=(*leading, 3, 2)), jnp.bfloat16),
        'text_mask': jnp.ones((*leading, 3), jnp.int32),
        'pooled': jnp.asarray(rng.normal(size=(*leading, 2)), jnp.float32),
    }
    null = {'text': np.full((3, 2), 7, np.float32), 'text_mask': np.array([1, 0, 0], np.int32), 'pooled': np.full(2, 9)}
    got = jax.jit(drop_captions)(jax.random.key(0), batch, null, 0.1)
    assert {name: (array.shape, array.dtype) for name, array in got.items()} == {
        name: (array.shape, array.dtype) for name, array in batch.items()
    }
    dropped = np.asarray(got['pooled'] == 9).all(axis=-1)
    assert abs(dropped.mean() - 0.1) < 0.02
    for name, empty in null.items():
        array, before = np.asarray(got[name], np.float32), np.asarray(batch[name], np.float32)
        np.testing.assert_array_equal(array[dropped], np.broadcast_to(empty, array[dropped].shape))
        np.testing.assert_array_equal(array[~dropped], before[~dropped])
    np.testing.assert_array_equal(got['latents'], batch['latents'])
    for probability in (0.0, 1.0):
        array = drop_captions(jax.random.key(1), batch, null, probability)['pooled']
        np.testing.assert_array_equal(array, batch['pooled'] if probability == 0 else np.full_like(array, 9))


def counted(folder, first: int) -> SampleSource:
    spec = RecordSpec({'text': ArraySpec((3,), 'float32')})
    with SampleWriter(folder, spec, 4, protocol={'seed': 0}, samples_per_shard=2) as writer:
        for index in writer.missing():
            writer.append({'index': index, 'prompt': 'x', 'text': np.full(3, first + index, np.float32)})
    return SampleSource(folder)


def test_the_identity_of_data_is_its_content(tmp_path):
    """Sample sets with equal settings and other samples differ; a copy does not."""
    one, same, other = (counted(tmp_path / name, first) for name, first in (('a', 0), ('b', 0), ('c', 1)))
    assert one.protocol == other.protocol
    assert identity(one) == identity(same) != identity(other)
    train, held_out = hold_out(one, 1)
    assert len({identity(one), identity(train), identity(held_out), identity(hold_out(other, 1)[0])}) == 4
    mixed = [identity(Mixture([one, source], [1, weight])) for source, weight in ((same, 1), (other, 1), (same, 2))]
    assert len(set(mixed)) == 3 and all(mixed)
    assert identity(Numbers(3, 1, 1)) == '' == identity(Mixture([Numbers(3, 1, 1), Numbers(3, 1, 2)], [1, 1]))
