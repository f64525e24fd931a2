"""Sample sets in a bucket: written shard by shard from two machines, interrupted, and read from a copy."""

from __future__ import annotations

import gcsfs
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from train.data import SampleSource, SampleSpec, SampleWriter, bucket_set

SPEC = SampleSpec(latents=(1, 2, 2, 2), text=(1, 2), pooled=2, latents_dtype='float32')
COUNT = 7


def sample(index: int) -> dict:
    latents = np.random.default_rng(index).normal(size=SPEC.latents)
    text = {'text': np.zeros((1, 2)), 'text_mask': np.ones(1, np.int32), 'prompt': f'sample {index}'}
    return {'index': index, 'pooled': np.zeros(2), 'latents': latents} | text


def write(folder, part: int, most: int = COUNT, count: int = COUNT) -> bool:
    """Write up to `most` samples of one of two parts; return whether the set is complete."""
    writer = SampleWriter(folder, SPEC, count, protocol={}, samples_per_shard=2, part=part, parts=2)
    for index in writer.missing()[:most]:
        writer.append(sample(index))
    return writer.close()


def machine(number: int, tmp_path, monkeypatch) -> None:
    """Continue on a machine with a disk of its own."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / f'machine {number}'))


def test_a_set_written_by_two_machines_reads_like_one_on_disk(bucket, tmp_path, monkeypatch):
    folder = bucket / 'samples'
    machine(1, tmp_path, monkeypatch)
    assert not write(folder, 0, most=3)
    machine(2, tmp_path, monkeypatch)
    assert not write(folder, 1)
    with pytest.raises(InputError, match='run its writer again'):
        SampleSource(folder)
    machine(1, tmp_path, monkeypatch)
    writer = SampleWriter(folder, SPEC, COUNT, protocol={}, samples_per_shard=2, part=0, parts=2)
    assert writer.missing() == [5]
    writer.close()
    # A third machine has the complete shard of the first, not its journal.
    machine(3, tmp_path, monkeypatch)
    assert write(folder, 0)
    for part in (0, 1):
        write(tmp_path / 'disk', part)
    stored, local = SampleSource(folder, verify=True), SampleSource(tmp_path / 'disk')
    assert len(stored) == len(local) == COUNT
    for index in range(COUNT):
        assert stored[index]['prompt'] == local[index]['prompt']
        np.testing.assert_array_equal(stored[index]['latents'], local[index]['latents'])


@pytest.mark.parametrize('last', [0, 1])
def test_a_set_knows_its_conditionings_whichever_machine_ends_last(bucket, tmp_path, monkeypatch, last):
    folder, arrays = (
        bucket / 'samples',
        {'text': np.ones((1, 2)), 'text_mask': np.ones(1, np.int32), 'pooled': np.ones(2)},
    )
    for part in (1 - last, last):
        machine(part, tmp_path, monkeypatch)
        writer = SampleWriter(folder, SPEC, COUNT, protocol={}, samples_per_shard=2, part=part, parts=2)
        if part == 0:
            writer.write_negative(**arrays)
        for index in writer.missing():
            writer.append(sample(index))
        writer.close()
    # Another set's negative prompt, by mistake.
    local = tmp_path / 'another.npz'
    np.savez(local, **{name: 2 * array for name, array in arrays.items()})
    bucket_set.upload({f'{folder}/negative.npz': local})
    machine(3, tmp_path, monkeypatch)
    with pytest.raises(InputError, match='negative'):
        SampleSource(folder).negative()


def test_a_shard_whose_upload_fails_is_uploaded_by_the_next_writer(bucket, monkeypatch):
    def fail(files):
        raise ConnectionError

    folder = bucket / 'samples'
    write(folder, 1)
    with monkeypatch.context() as patch:
        writer = SampleWriter(folder, SPEC, COUNT, protocol={}, samples_per_shard=2, part=0, parts=2)
        writer.append(sample(0))
        patch.setattr(bucket_set, 'upload', fail)
        with pytest.raises(ConnectionError):
            writer.append(sample(1))
    writer = SampleWriter(folder, SPEC, COUNT, protocol={}, samples_per_shard=2, part=0, parts=2)
    assert writer.missing() == [4, 5]
    writer.close()
    assert write(folder, 0) and len(SampleSource(folder)) == COUNT


def test_a_set_with_other_settings_is_refused(bucket, tmp_path, monkeypatch):
    machine(1, tmp_path, monkeypatch)
    write(bucket / 'samples', 0, most=1)
    machine(2, tmp_path, monkeypatch)
    with pytest.raises(InputError, match='was begun with count = 7, not 8'):
        write(bucket / 'samples', 0, count=8)


def test_a_shard_costs_as_many_requests_as_the_first(bucket, monkeypatch):
    count, requests, counts = 12, [0], []
    call = gcsfs.GCSFileSystem._call

    async def counted(self, *given, **named):
        requests[0] += 1
        return await call(self, *given, **named)

    monkeypatch.setattr(gcsfs.GCSFileSystem, '_call', counted)
    writer = SampleWriter(bucket / 'samples', SPEC, count, protocol={}, samples_per_shard=1)
    for index in range(count):
        before = requests[0]
        writer.append(sample(index))
        counts.append(requests[0] - before)
    assert writer.close()
    assert set(counts) == {counts[0]}


def test_shards_that_are_gone_from_the_bucket_are_written_again(bucket):
    folder = bucket / 'samples'
    write(folder, 0)
    (folder / bucket_set.RECORDS / '00002.json').unlink()
    writer = SampleWriter(folder, SPEC, COUNT, protocol={}, samples_per_shard=2, part=0, parts=2)
    assert writer.missing() == [4, 5]
