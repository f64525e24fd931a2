"""Processes with different runs stop before the first step, with one line each."""

from __future__ import annotations

import sys

import pytest

from support.jobs import Job
from support.toy_program import LinearSource, Toy, config_for
from train.runtime.agreement import code_version, differences
from train.runtime.runner import exit_on_errors


def test_differences_name_the_leaves():
    first, other = {'a': {'b': 1, 'c': 2}, 'd': [1]}, {'a': {'b': 1, 'c': 3}, 'd': [1, 2]}
    assert differences(first, other) == 'a.c: 2 on process 0, 3 here; d: [1] on process 0, [1, 2] here'
    assert differences(first, first) == ''
    assert len(code_version()) == 16


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('seed', 'process 1 has another data or objective and settings than process 0'),
        (
            'data',
            'process 1 has another data or objective than process 0 (number of samples: 40 on process 0, 41 here)',
        ),
    ],
)
def test_a_process_with_another_run_is_named(tmp_path, kind, message):
    with Job([__file__, str(tmp_path / 'run'), kind], tmp_path / 'log.txt', devices=1) as job:
        assert job.wait(120) == 2, job.output
        assert f'[1] error: {message}' in job.output
        assert '[0] error: process 1 has another' in job.output
        assert 'Traceback' not in job.output


def train(folder: str, kind: str) -> None:
    """Train with another seed or data on process 1."""
    import os

    from train.runtime.loop import run
    from train.runtime.sharding import MeshConfig

    second = os.environ['JAX_PROCESS_ID'] == '1'
    source = LinearSource(41 if second and kind == 'data' else 40)
    seed = int(second and kind == 'seed')
    run(Toy(), source, config_for(folder, steps=2, mesh=MeshConfig(2, 1, 1), seed=seed))


if __name__ == '__main__':
    exit_on_errors(lambda: train(*sys.argv[1:]))
