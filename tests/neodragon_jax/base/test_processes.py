"""Processes that share a list of work and no steps: how they are stopped, how they end, what they tell each other."""

from __future__ import annotations

import re
import signal

import pytest

from support.goldens import ROOT
from support.jobs import Job

START = """
import time, jax
from neodragon_jax.base.command_line import exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.processes import separate_shares

def work():
    with separate_shares(True) as (index, count):
        print(f'process {index} of {count} works', flush=True)
"""
END = """
        print('finished', flush=True)

raise SystemExit(exit_status(work))
"""


@pytest.fixture
def job(tmp_path):
    """A function that makes a job of two processes with some lines of work."""

    def start(*lines: str, before: str = '') -> Job:
        path = tmp_path / 'script.py'
        path.write_text(before + START + ''.join(f'        {line}\n' for line in lines) + END)
        return Job([str(path)], tmp_path / 'log.txt', devices=1)

    return start


def test_sigterm_ends_a_process_at_once(job):
    """JAX's preemption service, which only a training asks, would take the signal."""
    with job('time.sleep(600)') as started:
        started.until(lambda: started.output.count('works') == 2)
        started.launcher.send_signal(signal.SIGTERM)
        assert started.wait(20) == 128 + signal.SIGTERM
        assert 'finished' not in started.output


def test_the_failure_of_one_process_is_in_the_log_of_the_others_which_finish(job):
    wait = 'for _ in range(0 if index else 6): time.sleep(1)'
    fail = 'if index == 1: raise InputError("the disk of this host is not there; mount it.")'
    with job(fail, wait) as started:
        assert started.wait(60) == 2, started.output
        lines = started.output.splitlines()
    told = '[0] another process has failed, and its share is missing: process 1 of 2 on '
    assert [
        line
        for line in lines
        if line.startswith(told) and line.endswith(': the disk of this host is not there; mount it.')
    ]
    assert '[0] finished' in lines and '[1] finished' not in lines
    assert '[1] error: the disk of this host is not there; mount it.' in lines


# JAX's own limit, 300 s, is too long to wait for; with one of a second the same happens after ten.
WORK_S = 14
SHORT = """
from jax._src import distributed
real = distributed._jax.get_distributed_runtime_client
distributed._jax.get_distributed_runtime_client = lambda *given, **named: real(*given, **named, shutdown_timeout=1)
"""


def test_a_finished_process_does_not_end_those_that_work(job):
    with job(f'time.sleep({WORK_S} * index)', before=SHORT) as started:
        assert started.wait(60) == 0, started.output
        assert started.output.count('finished') == 2


def test_a_training_that_ends_early_waits_too(tmp_path):
    path = tmp_path / 'script.py'
    work = f'start_processes()\ntime.sleep({WORK_S} * jax.process_index())\nprint("finished")\n'
    path.write_text(f'import time, jax\nfrom neodragon_jax.base.processes import start_processes\n{SHORT}{work}')
    with Job([str(path)], tmp_path / 'log.txt', devices=1) as started:
        assert started.wait(60) == 0, started.output
        assert started.output.count('finished') == 2


SEPARATE = """
import os, pathlib, sys
from neodragon_jax.base import shared_folder
from neodragon_jax.base.command_line import exit_status
from neodragon_jax.base.processes import separate_shares

shared_folder._SEEN_WITHIN_S = 1.0

def work():
    folders = [pathlib.Path(sys.argv[1]) / name for name in sys.argv[2:]]
    with separate_shares(True, folder=folders[int(os.environ['JAX_PROCESS_ID'])]):
        print('works', flush=True)

raise SystemExit(exit_status(work))
"""


@pytest.mark.parametrize(('folders', 'status'), [('aa', 0), ('ab', 2)], ids=['shared', 'a folder of each host'])
def test_hosts_must_share_the_folder_of_their_shares(tmp_path, folders, status):
    """Otherwise each host would write a part of the set, and nothing would say that it is not whole."""
    path = tmp_path / 'script.py'
    path.write_text(SEPARATE)
    with Job([str(path), str(tmp_path), *folders], tmp_path / 'log.txt', devices=1) as started:
        assert started.wait(60) == status, started.output
    told = re.findall(
        r'\[(\d)\] error: --out .*: the hosts do not share .* process 1 on \S+ does not see', started.output
    )
    assert sorted(told) == (['0', '1'] if status else [])
    assert started.output.count('works') == (0 if status else 2)
    assert not list(tmp_path.glob('[ab]'))


def test_every_command_with_distributed_has_separate_shares():
    """`start_processes` alone is for trainings, which ask JAX whether to stop."""
    texts = {path: path.read_text() for name in ('neodragon_jax', 'train') for path in (ROOT / name).rglob('*.py')}
    commands = [path for path, text in texts.items() if re.search(r'(?<!def )add_distributed\(', text)]
    assert len(commands) >= 4
    given = re.compile(r'separate_shares\(\w+\.distributed, \w+\.start_timeout_s, \w+\.out\)')
    assert [str(path) for path in commands if not given.search(texts[path])] == []
