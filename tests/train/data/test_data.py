"""Teacher samples on disk (read back by TFDS and by the project, damage reported), and the loader's order."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorflow_datasets as tfds

from neodragon_jax.base.errors import InputError
from support.goldens import ROOT
from train.data import ArraySpec, RecordSpec, SampleSource, SampleSpec, SampleWriter
from train.runtime.loader import Loader, abstract_batch
from train.runtime.sharding import MeshConfig, batch_sharding, make_mesh

COUNT = 11
SPEC = SampleSpec(latents=(2, 4, 6, 3), text=(5, 7), pooled=4)
PROTOCOL = {'teacher': 'multistep', 'steps': [20, 20, 20], 'guidance': 5.0}


def sample(index: int) -> dict:
    rng = np.random.default_rng(index)
    return {
        'index': index,
        'prompt': f'a dragon née №{index}',
        'latents': rng.normal(size=SPEC.latents).astype(ml_dtypes.bfloat16),
        'text': rng.normal(size=SPEC.text).astype(np.float32),
        'text_mask': (np.arange(5) <= index % 5).astype(np.int32),
        'pooled': rng.normal(size=4).astype(np.float32),
    }


def writer_for(folder, **changes) -> SampleWriter:
    return SampleWriter(folder, SPEC, COUNT, **{'protocol': PROTOCOL, 'samples_per_shard': 4} | changes)


def fill(folder, limit: int = COUNT, **changes) -> bool:
    """Write up to `limit` missing samples, as a process that ends then does; return whether the dataset is complete."""
    writer = writer_for(folder, **changes)
    for index in writer.missing()[:limit]:
        writer.append(sample(index))
    return writer.close()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('samples') / 'teacher'
    assert fill(path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / 'copy')


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
        if isinstance(value, np.ndarray):
            assert got[name].dtype == value.dtype


def test_samples_come_back_bit_for_bit(folder):
    source = SampleSource(folder, verify=True)
    assert len(source) == COUNT
    assert source.spec == SPEC
    assert source.protocol == PROTOCOL
    for index in (0, 3, 4, 10):
        assert_same(source[index], sample(index))


def test_tfds_reads_the_folder(folder):
    builder = tfds.builder_from_directory(folder)
    assert builder.info.name == 'teacher_samples'
    assert builder.info.splits['train'].shard_lengths == [4, 4, 3]
    records = builder.as_data_source(split='train')
    for index, record in enumerate(records):
        assert_same(record | {'prompt': record['prompt'].decode()}, sample(index))


def test_resumed_writing_equals_unbroken_writing(folder, tmp_path):
    assert not fill(tmp_path, limit=6)
    first = (tmp_path / 'teacher_samples-train.array_record-00000-of-00003').stat()
    with pytest.raises(InputError, match='not all samples are written'):
        SampleSource(tmp_path)
    # The process is killed in the middle of a shard: no chance to clean up.
    writer = writer_for(tmp_path)
    assert writer.missing() == list(range(6, COUNT))
    writer.append(sample(6))
    del writer
    assert writer_for(tmp_path).missing() == list(range(7, COUNT))
    assert fill(tmp_path)
    assert (tmp_path / 'teacher_samples-train.array_record-00000-of-00003').stat().st_mtime_ns == first.st_mtime_ns
    # Equal sizes and hashes of all shards.
    assert json.loads((tmp_path / 'manifest.json').read_text()) == json.loads((folder / 'manifest.json').read_text())
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith('.')]
    assert writer_for(tmp_path).missing() == []


# Writes the bytes of one record.
RECORD = """
import sys
import numpy as np
from train.data import SampleSpec
spec = SampleSpec(latents=(2, 4, 6, 3), text=(5, 7), pooled=4)
values = {name: np.ones(array.shape, array.dtype) for name, array in spec.arrays.items() if array.dtype == 'int32'}
values |= {'latents': np.zeros((2, 4, 6, 3)), 'text': np.zeros((5, 7)), 'pooled': np.zeros(4), 'prompt': 'x'}
stored = {name: spec.conform(name, values[name], 'sample') for name in spec.names()}
sys.stdout.buffer.write(spec.serializer()(stored | {'index': 3}))
"""


def test_equal_samples_are_equal_bytes_in_every_process():
    """TFDS's own order of the fields differs between processes."""
    records = [subprocess.check_output([sys.executable, '-c', RECORD], cwd=ROOT) for _ in range(2)]
    assert records[0] == records[1] and len(records[0]) > 300


def test_two_parts_make_one_dataset(folder, tmp_path):
    assert writer_for(tmp_path, part=1, parts=2).missing() == [4, 5, 6, 7]
    assert not fill(tmp_path, part=1, parts=2)
    assert fill(tmp_path, part=0, parts=2)
    assert json.loads((tmp_path / 'manifest.json').read_text()) == json.loads((folder / 'manifest.json').read_text())


def test_a_writer_tells_whether_the_set_is_complete(tmp_path):
    first, second = (writer_for(tmp_path, part=part, parts=2) for part in range(2))
    for writer in (first, second):
        for index in writer.missing():
            writer.append(sample(index))
        if writer is first:
            assert not writer.close()
    assert second.close()
    of_all = len(range(0, COUNT, 4))
    share = len(range(1, of_all, 2))
    assert (
        first.state == f'{share} of {of_all} shards of the set are missing; the process that finishes last completes it'
    )
    assert second.state == 'the set is complete'


def test_folder_keeps_to_its_plan(copied):
    with pytest.raises(InputError, match=r'begun with protocol.guidance = 5.0, not 7.0'):
        writer_for(copied, protocol=PROTOCOL | {'guidance': 7.0})
    with pytest.raises(InputError, match='begun with samples_per_shard = 4, not 5'):
        writer_for(copied, samples_per_shard=5)
    with pytest.raises(InputError, match='part=2 of 2'):
        writer_for(copied, part=2, parts=2)


def test_wrong_samples_are_refused(tmp_path):
    with writer_for(tmp_path) as writer:
        with pytest.raises(InputError, match=r'sample 1 is out of order.*next: 0'):
            writer.append(sample(1))
        with pytest.raises(InputError, match=r'latents has shape \[4, 6, 3\], the dataset \[2, 4, 6, 3\]'):
            writer.append(sample(0) | {'latents': sample(0)['latents'][0]})
        with pytest.raises(InputError, match='pooled is not finite in float32'):
            writer.append(sample(0) | {'pooled': np.array([0, np.nan, 0, 0])})
        writer.append(sample(0))
    with pytest.raises(InputError, match="text_dtype is 'int8'; use one of float32, bfloat16"):
        SampleSpec(latents=(1, 1, 1, 1), text=(1, 1), pooled=1, text_dtype='int8')


def test_negative_and_null_conditioning(copied):
    with pytest.raises(InputError, match=r'no negative\.npz'):
        SampleSource(copied).negative()
    negative, null = ({name: sample(seed)[name] for name in ('text', 'text_mask', 'pooled')} for seed in (98, 99))
    with writer_for(copied) as writer:
        writer.write_negative(**negative)
        writer.write_conditioning('null', null)
        with pytest.raises(InputError, match=r'null conditioning: text has shape \[7\]'):
            writer.write_conditioning('null', {'text': null['text'][0]})
    assert_same(SampleSource(copied).negative(), negative)
    assert_same(SampleSource(copied).null(), null)


def test_records_hold_what_their_spec_names(tmp_path):
    arrays = {'pixels': ArraySpec((2, 3), 'uint8'), 'start': ArraySpec((), 'float32')}
    spec = RecordSpec(arrays, texts=('caption', 'file'), blobs=('clip',))
    given = {
        'pixels': np.arange(6).reshape(2, 3),
        'start': 1.5,
        'caption': 'né 🐉',
        'file': 'a\nb',
        'clip': b'\xff\0\0',
    }
    with SampleWriter(tmp_path, spec, 1, protocol={}, name='clips') as writer:
        with pytest.raises(InputError, match=r'sample 0 has no clip'):
            writer.append({'index': 0} | {name: value for name, value in given.items() if name != 'clip'})
        with pytest.raises(InputError, match=r'pixels has values that uint8 does not hold'):
            writer.append(given | {'index': 0, 'pixels': given['pixels'] - 1})
        with pytest.raises(InputError, match=r'pixels has values that uint8 does not hold'):
            writer.append(given | {'index': 0, 'pixels': given['pixels'] / 2})
        with pytest.raises(InputError, match=r'caption has half a surrogate pair'):
            writer.append(given | {'index': 0, 'caption': '\ud83d'})
        writer.append(given | {'index': 0})
    source = SampleSource(tmp_path, verify=True)
    want = {'pixels': given['pixels'].astype(np.uint8), 'start': np.float32(1.5), 'index': 0}
    assert_same(source[0], given | want)
    assert source.spec == spec
    with pytest.raises(InputError, match=r'hold pixels, start, caption, file, clip, but no latents'):
        _ = source.spec.latents
    with pytest.raises(InputError, match=r'index is there twice'):
        RecordSpec(arrays, texts=('index',))
    with pytest.raises(InputError, match=r"dtype 'complex64' cannot be stored"):
        ArraySpec((), 'complex64')


def damage(path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == 'missing':
        path.unlink()
    elif kind == 'truncated':
        path.write_bytes(content[:-100])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize(
    ('name', 'kind', 'message'),
    [
        ('teacher_samples-train.array_record-00001-of-00003', 'missing', '00001-of-00003: missing'),
        ('teacher_samples-train.array_record-00001-of-00003', 'truncated', 'bytes, its manifest says'),
        ('teacher_samples-train.array_record-00001-of-00003', 'flipped', 'its content differs from its manifest'),
        ('manifest.json', 'missing', r'no manifest\.json in it'),
        ('manifest.json', 'truncated', r'manifest\.json: not valid JSON'),
        ('features.json', 'missing', r'features\.json is missing'),
        ('dataset_info.json', 'missing', r'dataset_info\.json is missing'),
    ],
)
def test_damage_is_named(copied, name, kind, message):
    damage(copied / name, kind)
    with pytest.raises(InputError, match=message):
        SampleSource(copied, verify=True)


def test_absent_folder_is_named(tmp_path):
    with pytest.raises(InputError, match='no such folder'):
        SampleSource(tmp_path / 'nowhere')


def loader_for(source, mesh=None, batch_size: int = 8, **options) -> Loader:
    mesh = mesh or make_mesh(MeshConfig(2, 2, 2))
    axis = 0 if options.get('updates') is None else 1
    return Loader(source, batch_sharding(mesh, axis), batch_size=batch_size, **options)


def indices(loader: Loader, batches: int) -> np.ndarray:
    return np.stack([np.asarray(next(loader)['index']) for _ in range(batches)])


def test_batches_hold_the_samples_and_no_text(folder):
    source = SampleSource(folder)
    batch = next(loader_for(source))
    assert 'prompt' not in batch
    for row, index in enumerate(np.asarray(batch['index'])):
        for name in ('latents', 'text', 'text_mask', 'pooled'):
            np.testing.assert_array_equal(np.asarray(batch[name][row]), sample(int(index))[name])
    assert batch['latents'].dtype == jax.numpy.bfloat16
    abstract = abstract_batch(source, batch['latents'].sharding, batch_size=8)
    assert batch.keys() == abstract.keys()
    for name, array in batch.items():
        assert (array.shape, array.dtype, array.sharding) == (
            abstract[name].shape,
            abstract[name].dtype,
            abstract[name].sharding,
        )


def test_every_epoch_has_each_sample_once_in_its_own_order(folder):
    order = indices(loader_for(SampleSource(folder), seed=3), 11).reshape(8, COUNT)
    assert (np.sort(order, axis=1) == np.arange(COUNT)).all()
    assert len({tuple(epoch) for epoch in order}) == 8


def test_order_depends_on_the_seed_alone(folder):
    source = SampleSource(folder)
    order = indices(loader_for(source, seed=3), 5)
    one, eight = make_mesh(MeshConfig(1, 1, 1)), make_mesh(MeshConfig(8, 1, 1))
    np.testing.assert_array_equal(indices(loader_for(source, one, seed=3), 5), order)
    np.testing.assert_array_equal(indices(loader_for(source, eight, seed=3), 5), order)
    assert (indices(loader_for(source, seed=4), 5) != order).any()


def test_updates_are_a_leading_axis(folder):
    source = SampleSource(folder)
    batch = next(loader_for(source, updates=3, seed=3))
    assert batch['latents'].shape == (3, 8, *SPEC.latents)
    assert batch['latents'].sharding.shard_shape(batch['latents'].shape) == (3, 2, *SPEC.latents)
    np.testing.assert_array_equal(np.asarray(batch['index']), indices(loader_for(source, seed=3), 3))


def test_loader_goes_on_where_its_state_says(folder):
    source = SampleSource(folder)
    order = indices(loader_for(source), 6)
    loader = loader_for(source)
    indices(loader, 2)
    state = json.loads(json.dumps(loader.get_state()))
    other = loader_for(source)
    other.set_state(state)
    np.testing.assert_array_equal(indices(other, 4), order[2:])
    np.testing.assert_array_equal(indices(loader, 4), order[2:])


def test_batches_that_do_not_fit_are_refused(folder):
    with pytest.raises(InputError, match='batch_size is 6, but data x fsdp of the mesh is 4; choose a multiple of 4'):
        loader_for(SampleSource(folder), batch_size=6)
