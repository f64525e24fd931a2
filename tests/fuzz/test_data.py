"""Mutated pictures, videos, caption tables and sample sets: each is read, or left out or refused in one line.

Seeded; a case fails if anything but the documented exceptions is raised, or if it takes longer than LONGEST_S.
"""

from __future__ import annotations

import pathlib
import random
import shutil

import av
import numpy as np
import pytest
from PIL import Image

from neodragon_jax.base.errors import InputError
from support.mutations import mutated, outcome
from train.data import ArraySpec, RecordSpec, SampleSource, SampleWriter
from train.data.captions import read_table
from train.data.inspection import Criteria, Verdict, inspect_file
from train.data.video_files import Unusable, inspect

CASES = 60
COUNT = 6
SPEC = RecordSpec({'latents': ArraySpec((4, 8), 'bfloat16'), 'units': ArraySpec((), 'int32')}, blobs=('clip',))


def video(path: pathlib.Path, codec: str) -> bytes:
    rng = np.random.default_rng(0)
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=24)
        stream.height, stream.width, stream.pix_fmt = 64, 96, 'yuv420p'
        stream.codec_context.thread_count = 1  # so that the same files are damaged everywhere
        for _ in range(12):
            pixels = rng.integers(0, 255, (8, 12, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format='rgb24')))
        container.mux(stream.encode())
    return path.read_bytes()


@pytest.mark.parametrize(
    ('suffix', 'codec'), [('.mp4', 'libx264'), ('.mkv', 'libx264'), ('.webm', 'libvpx-vp9'), ('.avi', 'mpeg4')]
)
def test_mutated_videos(tmp_path, suffix, codec):
    path = tmp_path / f'video{suffix}'
    content, rng = video(path, codec), random.Random(suffix)
    criteria = Criteria(frames=9, clips=1, min_fps=23, sizes=((64, 64),))
    for _ in range(CASES):
        path.write_bytes(mutated(content, rng))
        footage = outcome(lambda: inspect(path), Unusable)
        assert footage is None or (np.diff(footage.times) > 0).all()
        verdict = outcome(lambda: inspect_file(tmp_path, path.name, criteria))
        assert isinstance(verdict, Verdict) and not verdict.reason.startswith('cannot be read'), verdict.reason


@pytest.mark.parametrize('form', ['png', 'jpeg', 'webp'])
def test_mutated_pictures(tmp_path, form):
    path = tmp_path / f'picture.{form}'
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(path, format=form)
    content, rng = path.read_bytes(), random.Random(form)
    for _ in range(2 * CASES):
        path.write_bytes(mutated(content, rng))
        footage = outcome(lambda: inspect(path), Unusable)
        assert footage is None or len(footage.times) == 1


TABLES = {
    'csv': b'file,caption\na.mp4,"a ""big"" dog, running"\nb.mp4,a cat\nc.mp4,"two\nlines"\n',
    'tsv': b'File_Name\tText\na.mp4\ta dog\nb.mp4\ta cat\n',
    'jsonl': '{"file": "a.mp4", "caption": "né 🐉"}\n{"path": "b.mp4", "text": "a cat"}\n'.encode(),
}


@pytest.mark.parametrize('suffix', sorted(TABLES))
def test_mutated_caption_tables(tmp_path, suffix):
    path, rng = tmp_path / f'captions.{suffix}', random.Random(suffix)
    for _ in range(5 * CASES):
        path.write_bytes(mutated(TABLES[suffix], rng))
        captions = outcome(lambda: read_table(path, tmp_path), InputError)
        if captions is not None:
            for text in (*captions.by_file.values(), *captions.problems.values()):
                assert len(text.splitlines()) == 1
                text.encode()


@pytest.fixture(scope='module')
def samples(tmp_path_factory) -> pathlib.Path:
    folder, rng = tmp_path_factory.mktemp('samples') / 'set', np.random.default_rng(0)
    with SampleWriter(folder, SPEC, COUNT, protocol={'seed': 0}, samples_per_shard=2) as writer:
        for kind in ('negative', 'null'):
            writer.write_conditioning(kind, {'latents': rng.normal(size=(4, 8))})
        for index in writer.missing():
            writer.append(
                {'index': index, 'prompt': 'né', 'clip': b'x' * index, 'latents': rng.normal(size=(4, 8)), 'units': 1}
            )
    return folder


def read_all(folder: pathlib.Path) -> list[str]:
    source = SampleSource(folder)
    return [repr(source[index]) for index in range(len(source))] + [repr(source.negative()), repr(source.null())]


@pytest.mark.parametrize('name', ['manifest.json', 'negative.npz', 'train.array_record-00001', 'shards/00001.json'])
def test_mutated_sample_sets(samples, tmp_path, name):
    folder = pathlib.Path(shutil.copytree(samples, tmp_path / 'set'))
    (path,) = [path for path in folder.rglob('*') if name in str(path.relative_to(folder))]
    content, rng, want = path.read_bytes(), random.Random(name), read_all(samples)
    for _ in range(CASES):
        path.write_bytes(mutated(content, rng))
        if name.startswith('shards/'):
            writer = lambda: SampleWriter(folder, SPEC, COUNT, protocol={'seed': 0}, samples_per_shard=2).close()
            outcome(writer, InputError)
            continue
        found = outcome(lambda: read_all(folder), InputError)
        assert found is None or found == want  # damage is never accepted
