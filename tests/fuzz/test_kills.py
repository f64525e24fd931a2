"""Programs killed with SIGKILL at random moments: run again, they end with exactly the files of an uninterrupted run.

Jobs of several processes are killed in tests/train/runtime/test_kill.py, the writer of sample sets in
tests/train/data/test_writer_kill.py. The files of train.shapes.language differ between two unbroken runs, because the
training of its tokenizer depends on the order of hashes.
"""

from __future__ import annotations

import json
import pathlib
import random
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from neodragon_jax.base.files import file_sha256
from neodragon_jax.base.video import read_mp4
from support.program_lines import PROGRAMS, Lines, finish, start, training_of
from train.data import SampleSource
from train.data.manifest import MANIFEST
from train.runtime.metrics import JSON_LINES, SPEED, read_metrics

# Over PROGRAMS these are more than 100.
KILLS = 6


@pytest.fixture(scope='module')
def lines(tmp_path_factory) -> Iterator[Lines]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path_factory.mktemp('compiled')))
        patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
        yield Lines(tmp_path_factory.mktemp('inputs'))


def content(program: str, folder: pathlib.Path) -> dict[str, str]:
    """Return a digest of every file, hidden ones included, of which two unbroken runs are equal."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob('*')) if path.is_file()}
    if training_of(program):
        rows = [{name: row[name] for name in row if name not in SPEED} for row in read_metrics(folder)]
        result = {name: file_sha256(path) for name, path in found.items() if name.startswith('result/')}
        assert result
        return result | {JSON_LINES: json.dumps(rows)}
    if program == 'export':
        # Reports and records hold times, and binaries are not always the same bytes.
        return {name: file_sha256(path) if path.suffix == '.onnx' else '' for name, path in found.items()}
    return {name: digest(path) for name, path in found.items()}


def digest(path: pathlib.Path) -> str:
    """Return a digest of a file. Of videos only the shape counts: x264 does not always write the same."""
    if path.suffix == '.mp4':
        return str(read_mp4(path).shape)
    folder = next((folder for folder in path.parents if (folder / MANIFEST).is_file()), None)
    source = SampleSource(folder, verify=True) if folder else None
    if source is None or not source.spec.blobs:
        return file_sha256(path)
    return '' if path.name != MANIFEST else ''.join(text_of(source[index]) for index in range(len(source)))


def text_of(sample: dict[str, Any]) -> str:
    """Return a sample of a set of clips as text, without the clip."""
    return str({name: '' if isinstance(value, bytes) else value for name, value in sorted(sample.items())})


@pytest.mark.slow
@pytest.mark.parametrize('program', PROGRAMS)
def test_a_killed_program_ends_like_an_unbroken_one(program, lines, tmp_path):
    whole = content(program, lines.made(program))
    seconds = finish(lines.of(program, tmp_path / 'again'))  # with the compile cache of the first run
    assert content(program, tmp_path / 'again') == whole, 'two unbroken runs differ'
    clock, out, line = random.Random(program), tmp_path / 'out', lines.of(program, tmp_path / 'out')
    killed = 0
    while killed < KILLS:
        with start(line) as running:
            try:
                _, errors = running.communicate(timeout=clock.uniform(0.2, 1) * seconds)
            except subprocess.TimeoutExpired:
                running.kill()
                running.communicate()
                killed += 1
            else:
                assert running.returncode == 0, errors.decode()
                # It has ended before it was killed: begin again in an empty folder.
                assert content(program, out) == whole
                out.rename(tmp_path / f'finished-{killed}-{clock.random()}')
    finish(line)
    assert content(program, out) == whole
