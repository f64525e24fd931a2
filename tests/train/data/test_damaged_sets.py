"""A sample set runs no code from its folder, keeps few files open, and reports damage in one line."""

from __future__ import annotations

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from support.goldens import ROOT
from train.data import ArraySpec, RecordSpec, SampleSource, SampleWriter, sample_source, shards

SPEC = RecordSpec({'latents': ArraySpec((4, 8), 'bfloat16')})
COUNT = 6
EXTRA_FILES = 60


def write(folder: pathlib.Path, count: int = COUNT, per_shard: int = 2) -> pathlib.Path:
    rng = np.random.default_rng(0)
    with SampleWriter(folder, SPEC, count, protocol={'seed': 0}, samples_per_shard=per_shard) as writer:
        for kind in ('negative', 'null'):
            writer.write_conditioning(kind, {'latents': rng.normal(size=(4, 8))})
        for index in writer.missing():
            writer.append({'index': index, 'prompt': f'prompt {index}', 'latents': rng.normal(size=(4, 8))})
    return folder


@pytest.fixture(scope='module')
def original(tmp_path_factory) -> pathlib.Path:
    return write(tmp_path_factory.mktemp('sets') / 'set')


@pytest.fixture
def copied(original, tmp_path) -> pathlib.Path:
    return shutil.copytree(original, tmp_path / 'set')


def read_all(folder: pathlib.Path) -> list:
    source = SampleSource(folder)
    return [*(source[index] for index in range(len(source))), source.negative(), source.null()]


def test_no_class_that_the_data_names_is_imported(copied, tmp_path):
    features = (copied / 'features.json').read_text()
    assert 'features_dict.FeaturesDict' in features
    (copied / 'features.json').write_text(
        features.replace('tensorflow_datasets.core.features.features_dict.FeaturesDict', 'set.evil.Features')
    )
    (copied / 'evil.py').write_text('open("RAN", "w")')
    code = 'from train.data import SampleSource; source = SampleSource("set"); print(source[3]["prompt"])'
    environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), str(tmp_path)])}
    run = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == 'prompt 3'
    assert not (tmp_path / 'RAN').exists()


def test_few_files_stay_open_however_many_shards_there_are(tmp_path):
    count = shards.OPEN_READERS + 40
    folder = write(tmp_path / 'set', count, per_shard=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir('/proc/self/fd'))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + shards.OPEN_READERS + EXTRA_FILES // 2, before[1]))
    try:
        source = SampleSource(folder)
        assert [source[index]['index'] for index in range(count)] == list(range(count))
        assert source[0]['prompt'] == 'prompt 0'
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def shard_paths(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob('*array_record*'))


def swap(one: pathlib.Path, other: pathlib.Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def test_swapped_shards_are_refused(copied, monkeypatch):
    first, second, _ = shard_paths(copied)
    assert first.stat().st_size == second.stat().st_size
    swap(first, second)
    with pytest.raises(InputError, match=r'its content differs from its manifest\. Copy the file again'):
        SampleSource(copied)
    monkeypatch.setattr(sample_source, 'VERIFIED_BYTES', 0)  # as of a set that is too large to verify when it is opened
    source = SampleSource(copied)
    with pytest.raises(InputError, match=r'holds sample 2 in the place of 0\. Copy the files again'):
        source[0]
    assert source[5]['prompt'] == 'prompt 5'


@pytest.mark.parametrize('where', [0.1, 0.5, 0.9])
def test_a_damaged_shard_is_named_when_it_is_read(copied, monkeypatch, where):
    monkeypatch.setattr(sample_source, 'VERIFIED_BYTES', 0)
    path = shard_paths(copied)[0]
    content = bytearray(path.read_bytes())
    size = int(len(content) * where)
    content[size : size + 3000] = bytes(len(content[size : size + 3000]))
    path.write_bytes(content)
    source = SampleSource(copied)
    want = SampleSource(copied)[3]
    try:
        for index in (0, 1):  # either damage is named, or the sample is unharmed
            assert source[index]['prompt'] == f'prompt {index}'
    except InputError as error:
        assert str(path) in str(error) and 'Copy' in str(error)
    assert source[3]['prompt'] == want['prompt']


@pytest.mark.parametrize('kind', ['negative', 'null'])
def test_a_damaged_conditioning_is_named(copied, original, kind):
    path = copied / f'{kind}.npz'
    content = path.read_bytes()
    rng = np.random.default_rng(1)
    for damaged in (content[:-20], b'', b'PK', bytes(rng.bytes(300)), (copied / 'manifest.json').read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f'{kind}.npz: its content differs from its manifest'):
            getattr(SampleSource(copied), kind)()
    swap(path, copied / ('null.npz' if kind == 'negative' else 'negative.npz'))
    with pytest.raises(InputError, match='Copy the file again'):
        getattr(SampleSource(copied), kind)()
    np.testing.assert_array_equal(getattr(SampleSource(original), kind)()['latents'].shape, (4, 8))


def test_any_change_of_a_manifest_is_noticed(copied):
    path = copied / 'manifest.json'
    content = path.read_bytes()
    want = read_all(copied)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            assert len(read_all(copied)) == len(want)
            assert json.loads(damaged) == json.loads(content)
        except InputError as error:
            assert '\n' not in str(error) and 'manifest.json' in str(error)
            refused += 1
    assert refused > 250


MANGLED = [
    ('count', -1), ('count', '6'), ('count', 10**30), ('count', True), ('samples_per_shard', 0), ('shards', {}),
    ('shards', [1]), ('shards', []), ('spec', None), ('spec', {'arrays': {}}), ('name', '../x'), ('name', 5),
    ('protocol', []), ('complete', 1),
    ('spec', {'arrays': {'x': {'shape': [-1], 'dtype': 'int8'}}, 'texts': [], 'blobs': []}),
    ('spec', {'arrays': {'x': {'shape': [10**12], 'dtype': 'int8'}}, 'texts': [], 'blobs': []}),
    ('spec', {'arrays': {'x': {'shape': [2], 'dtype': 'object'}}, 'texts': [], 'blobs': []}),
    ('spec', {'arrays': {}, 'texts': 'prompt', 'blobs': []}),
]  # fmt: skip


@pytest.mark.parametrize(('key', 'value'), MANGLED)
def test_a_manifest_with_other_types_is_refused_in_one_line(copied, key, value):
    """Also of format 2, which has no checksum."""
    manifest = json.loads((copied / 'manifest.json').read_text())
    manifest = {name: old for name, old in manifest.items() if name != 'checksum'} | {'format': 2, key: value}
    (copied / 'manifest.json').write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf'manifest\.json: (its )?{key}') as caught:
        SampleSource(copied)
    assert '\n' not in str(caught.value)


def test_format_2_is_read(copied):
    manifest = json.loads((copied / 'manifest.json').read_text())
    del manifest['checksum'], manifest['conditioning']
    (copied / 'manifest.json').write_text(json.dumps(manifest | {'format': 2}))
    assert SampleSource(copied)[1]['prompt'] == 'prompt 1'
    assert SampleSource(copied).null()['latents'].shape == (4, 8)
    path = copied / 'null.npz'
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r'null\.npz'):
        SampleSource(copied).null()


@pytest.mark.parametrize('content', ['', '{"file": 1}', '[]', '{"file": "x", "count": 2, "bytes": 0, "sha256": ""}'])
def test_a_damaged_record_of_a_shard_is_named(copied, content):
    (copied / 'shards' / '00001.json').write_text(content)
    writer = SampleWriter(copied, SPEC, COUNT, protocol={'seed': 0}, samples_per_shard=2)
    with pytest.raises(InputError, match=r'00001\.json: damaged. Delete it and run the writer again'):
        writer.close()


def test_a_full_disk_is_an_error_of_the_system_and_loses_nothing(tmp_path, monkeypatch):
    class Full(shards.ArrayRecordWriter):
        def close(self) -> None:
            super().close()
            raise RuntimeError('write() failed: No space left on device; writing x; at byte 1')

    monkeypatch.setattr(shards, 'ArrayRecordWriter', Full)
    with pytest.raises(OSError, match='No space left on device') as caught:
        write(tmp_path / 'set')
    assert caught.value.errno == 28 and '00000' in str(caught.value.filename)
    monkeypatch.undo()
    writer = SampleWriter(tmp_path / 'set', SPEC, COUNT, protocol={'seed': 0}, samples_per_shard=2)
    assert writer.missing() == [2, 3, 4, 5]
    writer.close()
    write(tmp_path / 'set')
    assert [sample['index'] for sample in read_all(tmp_path / 'set')[:-2]] == list(range(COUNT))
