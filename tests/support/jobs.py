"""A command in a separate process, which a test may kill."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from support import goldens

ROOT = goldens.GOLDENS.parents[1]


PATIENCE = 120.0


class Job:
    """A launched job whose output goes to a file; none of its processes outlives the block.

    with Job(['train.dmd', '--config=...'], tmp_path / 'log.txt') as job:
        assert job.wait() == 0, job.output
    """

    def __init__(
        self,
        command: list[str],
        log: pathlib.Path,
        processes: int = 2,
        devices: int = 4,
        patience: float = PATIENCE,
    ) -> None:
        own = ['-m', 'train.launch', '--processes', str(processes), '--devices', str(devices)]
        paths = {'PYTHONPATH': os.pathsep.join([str(ROOT), *sys.path])}
        self.log, self.count, self.patience = log, processes, patience
        with log.open('wb') as file:
            self.launcher = subprocess.Popen(
                [sys.executable, *own, '--', *command],
                cwd=ROOT,
                env=os.environ | paths,
                stdout=file,
                stderr=file,
            )
        self._seen: dict[int, psutil.Process] = {}

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception) -> None:
        self.workers()
        for process in (self.launcher, *self._seen.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.launcher.wait()

    @property
    def output(self) -> str:
        return self.log.read_text()

    def workers(self) -> list[psutil.Process]:
        """Return the processes of the job that live, in their order; remember them."""
        try:
            children = sorted(psutil.Process(self.launcher.pid).children(), key=lambda child: child.create_time())
            living = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        except psutil.NoSuchProcess:
            living = []
        self._seen |= {process.pid: process for process in living}
        return living

    def wait(self, seconds: float | None = None) -> int:
        """Return the status when the job has ended."""
        seconds = seconds or self.patience
        try:
            return self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f'the job did not end in {seconds:.0f} s:\n{self.output}')

    def until(self, condition: Callable[[], object]) -> None:
        """Return when a condition holds."""
        deadline = time.monotonic() + self.patience
        while not condition():
            if self.launcher.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f'the job ended too early, or got stuck:\n{self.output}')
            time.sleep(0.01)

    def kill(self, victim: int) -> None:
        """Kill one of the workers, or the launcher (-1), and check that the whole job ends soon."""
        self.until(lambda: len(self.workers()) == self.count)
        workers = self.workers()
        if victim < 0:
            self.launcher.kill()
        else:
            workers[victim].kill()
        status = self.wait(30)
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive, f'{alive} outlive their launcher:\n{self.output}'
        if victim < 0:
            assert status == -signal.SIGKILL
        else:
            assert status == 128 + signal.SIGKILL, self.output
            assert f'launch: process {victim} of {self.count} was killed by SIGKILL' in self.output
