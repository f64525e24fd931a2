"""Waiting processes report the slow ones by name."""

from __future__ import annotations

import os
import sys
import time

from support.jobs import Job
from support.toy_program import LinearSource, Toy, config_for
from train.runtime import watch
from train.runtime.goodput import DATA, STEP
from train.runtime.watch import Place, delay_message


def place(process: int, step: int, activity: str = STEP, since: float = 0.0) -> Place:
    return Place(process, f'host{process}', 10 + process, step, activity, since)


def test_the_process_behind_is_named():
    line = delay_message(place(0, 7), [place(1, 7), place(2, 5, DATA)], 3, 50.0)
    assert line == (
        'process 0 has been at step 7 (step) for 50 s; '
        'behind it: process 2 (host2, pid 12): data wait at step 5 for 50 s'
    )
    assert 'process 1 (host1, pid 11): data wait at step 7' in delay_message(place(0, 7), [place(1, 7, DATA)], 2, 50.0)
    assert 'process 1, which has not reported' in delay_message(place(0, 7), [], 2, 50.0)


def test_who_is_behind_or_busy_names_nobody():
    assert delay_message(place(0, 5, DATA), [place(1, 7)], 2, 50.0) == ''
    assert delay_message(place(0, 7, DATA), [place(1, 7)], 2, 50.0) == ''
    assert delay_message(place(0, 7), [place(1, 7)], 2, 50.0) == ''


def test_a_straggler_is_named_while_the_others_wait(tmp_path):
    with Job([__file__, str(tmp_path / 'run')], tmp_path / 'log.txt', devices=1) as job:
        assert job.wait(120) == 0, job.output
        assert '[0] process 0 has been at step' in job.output
        assert 'behind it: process 1 (' in job.output and '[1] process 1 has been' not in job.output
    assert not list((tmp_path / 'run' / watch.FOLDER).iterdir())


class Slow(Toy):
    """Process 1 takes eight seconds before its fourth step."""

    def variant(self, step: int) -> int:
        if step == 3 and os.environ['JAX_PROCESS_ID'] == '1':
            time.sleep(8)
        return super().variant(step)


if __name__ == '__main__':
    from train.runtime.loop import run
    from train.runtime.sharding import MeshConfig

    watch.PERIOD_S, watch.QUIET_S = 0.5, 2.0
    run(Slow(), LinearSource(), config_for(sys.argv[1], steps=8, mesh=MeshConfig(2, 1, 1)))
