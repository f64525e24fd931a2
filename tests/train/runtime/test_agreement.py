"""Processes with different runs stop before the first step, with one line each."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import sys
import time

import jax
import pytest

from neodragon_jax.base import shared_folder
from neodragon_jax.base.processes import start_processes
from support.jobs import Job
from support.toy_program import LinearSource, Toy, WithEvaluations, config_for
from train.runtime import loop
from train.runtime.agreement import code_version, differences
from train.runtime.loop import run
from train.runtime.runner import exit_on_errors
from train.runtime.sharding import MeshConfig


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


def scored(folder, steps: int, count: int = 1) -> None:
    settings = {'evaluate_every': 1, 'keep_best': 1, 'best_metric': 'eval/distance', 'checkpoint_every': 1}
    run(WithEvaluations(), LinearSource(), config_for(folder, steps=steps, mesh=MeshConfig(count, 1, 1), **settings))


def test_processes_that_see_other_checkpoints_do_not_resume(tmp_path):
    """A network disk may show the files of a minute ago, without the newest checkpoint."""
    scored(tmp_path / 'run', 2)
    with Job([__file__, str(tmp_path / 'run'), 'stale'], tmp_path / 'log.txt', devices=1) as job:
        assert job.wait(120) == 2, job.output
        assert '[0] error: process 1 has another list of checkpoints than process 0; some hosts see' in job.output
        assert re.search(r'\[1\] error: process 1 .* \(2: \S+ \S+ on process 0, null here\); some hosts', job.output)


def test_hosts_must_share_the_folder_of_a_run(tmp_path):
    with Job([__file__, str(tmp_path), 'apart'], tmp_path / 'log.txt', devices=1) as job:
        assert job.wait(120) == 2, job.output
        told = r'error: config\.workdir .*: the hosts do not share this folder; process 1 on \S+ does not see'
        assert re.search(rf'\[0\] {told}', job.output) and re.search(rf'\[1\] {told}', job.output)


def test_all_processes_wait_for_the_run_before(tmp_path):
    """It may save its last checkpoint while process 0 waits for the folder."""
    scored(tmp_path / 'run', 2)
    (tmp_path / 'run' / 'checkpoints' / '2').rename(tmp_path / 'run' / 'aside')
    with Job([__file__, str(tmp_path / 'run'), 'race'], tmp_path / 'log.txt', devices=1) as job:
        assert job.wait(120) == 0, job.output
        assert '[0] toy: continuing from the checkpoint of step 2' in job.output


def resume(folder: str, kind: str) -> None:
    """Resume a run whose newest checkpoint process 1 does not see yet, or which is saved while process 0 waits."""
    start_processes()
    newest = pathlib.Path(folder) / 'checkpoints' / '2'
    if kind == 'stale' and jax.process_index() == 1:
        real, hidden = os.scandir, str(newest)

        def listed(path):
            found = [entry for entry in real(path) if entry.path != hidden]
            return contextlib.nullcontext(iter(found))

        os.scandir, os.listdir = listed, lambda path: [entry.name for entry in real(path) if entry.path != hidden]
    if kind == 'apart':
        folder, shared_folder._SEEN_WITHIN_S = f'{folder}/host{jax.process_index()}', 1.0
    lock = loop.folder_lock

    @contextlib.contextmanager
    def late(*given, **named):
        time.sleep(4)
        (pathlib.Path(folder) / 'aside').rename(newest)
        with lock(*given, **named):
            yield

    if kind == 'race':
        loop.folder_lock = late
    scored(folder, 2, 2)


def train(folder: str, kind: str) -> None:
    """Train with another seed or data on process 1."""
    second = os.environ['JAX_PROCESS_ID'] == '1'
    source = LinearSource(41 if second and kind == 'data' else 40)
    seed = int(second and kind == 'seed')
    run(Toy(), source, config_for(folder, steps=2, mesh=MeshConfig(2, 1, 1), seed=seed))


if __name__ == '__main__':
    exit_on_errors(lambda: (resume if sys.argv[2] in ('stale', 'race', 'apart') else train)(*sys.argv[1:]))
