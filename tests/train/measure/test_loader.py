"""The loader measurement is correct, and fails if the loader is too slow for the job."""

from __future__ import annotations

import re
import time

import pytest

from train.data import SampleSource
from train.measure import loader as loader_benchmark


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('benchmark') / 'set'
    loader_benchmark.write_samples(path, 24)
    return path


def arguments(folder, *more: str) -> list[str]:
    return ['--data', str(folder), '--batch', '8', '--steps', '2', *more]


class Slow:
    """A source with slow reads."""

    def __init__(self, source: SampleSource, pause_s: float) -> None:
        self._source, self._pause_s = source, pause_s

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        time.sleep(self._pause_s)
        return self._source[index]


def test_full_size_samples(folder):
    source = SampleSource(folder)
    assert source.spec.latents == (7, 40, 64, 16)
    assert source.spec.arrays['text'].shape == (128, 1536)
    assert (source[0]['latents'] != source[1]['latents']).any()


def test_rate_and_waits_follow_the_source(folder):
    slow = Slow(SampleSource(folder), 0.02)
    # Two threads read: at most 100 samples per second, and a batch every 80 ms.
    assert loader_benchmark.loader_rate(slow, 8, seed=0) < 130
    assert sum(loader_benchmark.waits(slow, 8, 0.0, steps=8)[2:]) > 6 * 0.05
    # A step that is longer than that finds its batch ready, however busy this machine is.
    assert min(loader_benchmark.waits(slow, 8, 0.5, steps=3)) < 0.05


def test_a_job_that_eats_more_than_there_is_fails(folder, capsys):
    assert loader_benchmark.main(arguments(folder, '--needs', '10', '--hosts', '2')) == 0
    printed = capsys.readouterr().out
    assert re.search(r'warm: [\d.]+ times the 5\.00 samples per second that each of 2 needs', printed)
    assert re.search(r'2 steps of 1\.60 s waited [\d.]+ ms each', printed)
    assert loader_benchmark.main(arguments(folder, '--needs', '1e9')) == 1
    assert loader_benchmark.main(arguments(folder, '--needs', '0')) == 2
    assert loader_benchmark.main(arguments(folder / 'nowhere')) == 2
