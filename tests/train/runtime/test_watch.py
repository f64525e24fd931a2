"""Waiting processes report the slow ones by name."""

from __future__ import annotations

import os
import re
import sys
import time
from typing import Any

import orbax.checkpoint as ocp
import pytest

from support.jobs import Job
from support.toy_program import LinearSource, Toy, config_for
from train.runtime import watch
from train.runtime.goodput import DATA, START, STEP
from train.runtime.watch import Place, delay_message


def place(process: int, step: int, activity: str = STEP, waiting: bool = False, seen: float = 40.0) -> Place:
    return Place(process, f'host{process}', 10 + process, step, activity, 'train/a.py:7 f', waiting, 0.0, seen)


def test_the_process_behind_is_named():
    line = delay_message(place(0, 7), [place(1, 7), place(2, 5, DATA)], 3, 50.0)
    assert line == (
        'process 0 has been at step 7 (step) for 50 s; '
        'behind it: process 2 (host2, pid 12): data wait at step 5 for 50 s, in train/a.py:7 f'
    )
    assert 'process 1 (host1, pid 11): data wait at step 7' in delay_message(place(0, 7), [place(1, 7, DATA)], 2, 50.0)
    assert 'process 1, which has not reported' in delay_message(place(0, 7), [], 2, 50.0)
    assert 'process 1, which has not reported' in delay_message(place(0, 7), [place(1, 7, seen=-20.0)], 2, 50.0)


def test_the_process_that_does_not_wait_is_behind():
    waiting = place(0, 0, START, waiting=True)
    line = delay_message(waiting, [place(1, 0, START, waiting=True), place(2, 0, START)], 3, 50.0)
    assert line.startswith('process 0 has waited at step 0 (start) for 50 s; behind it: process 2 (host2')
    assert 'process 1' not in line
    assert delay_message(place(2, 0, START), [waiting], 2, 50.0).count('host0') == 0


def test_who_is_behind_or_busy_names_nobody():
    assert delay_message(place(0, 5, DATA), [place(1, 7)], 2, 50.0) == ''
    assert delay_message(place(0, 7, DATA), [place(1, 7)], 2, 50.0) == ''
    assert delay_message(place(0, 7), [place(1, 7)], 2, 50.0) == ''


@pytest.mark.long
def test_a_straggler_is_named_while_the_others_wait(tmp_path):
    with Job([__file__, str(tmp_path / 'run')], tmp_path / 'log.txt', devices=1) as job:
        assert job.wait(120) == 0, job.output
        assert '[0] process 0 has been at step' in job.output
        assert 'behind it: process 1 (' in job.output and '[1] process 1 has been' not in job.output
    assert not list((tmp_path / 'run' / watch.FOLDER).iterdir())


@pytest.mark.long
def test_restoring_waits_for_a_slow_process_and_names_it(tmp_path):
    """Process 1 takes eight seconds to read its part of the checkpoint, in Orbax's restore."""
    command = [__file__, str(tmp_path / 'run'), 'restore']
    with Job(command, tmp_path / 'first.txt', devices=1) as job:
        assert job.wait(120) == 0, job.output
    with Job([*command, 'slow'], tmp_path / 'second.txt', devices=1) as job:
        assert job.wait(120) == 0, job.output
        assert '[0] toy: continuing from the checkpoint of step 8' in job.output
        told = [line for line in job.output.splitlines() if 'at step 0 (start)' in line]
        assert all(line.startswith('[0] process 0 has waited at step 0 (start) for ') for line in told), job.output
        assert any(re.search(r'behind it: process 1 \(.*test_watch\.py:\d+ slow_restore$', line) for line in told)


class Slow(Toy):
    """Process 1 takes eight seconds before its fourth step."""

    def variant(self, step: int) -> int:
        if step == 3 and os.environ['JAX_PROCESS_ID'] == '1':
            time.sleep(8)
        return super().variant(step)


RESTORE = ocp.StandardCheckpointHandler.restore


def slow_restore(handler: ocp.StandardCheckpointHandler, *arguments, **options) -> Any:
    """Read the arrays of a checkpoint slowly."""
    time.sleep(8)
    return RESTORE(handler, *arguments, **options)


if __name__ == '__main__':
    from train.runtime.loop import run
    from train.runtime.sharding import MeshConfig

    watch.PERIOD_S, watch.QUIET_S = 0.5, 2.0
    folder, *kind = sys.argv[1:]
    if kind[1:] and os.environ['JAX_PROCESS_ID'] == '1':
        ocp.StandardCheckpointHandler.restore = slow_restore
    program = Toy() if kind else Slow()
    run(program, LinearSource(), config_for(folder, steps=8 + 4 * len(kind[1:]), mesh=MeshConfig(2, 1, 1)))
