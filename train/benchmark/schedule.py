"""Parallel execution of the benchmark's commands: each starts once the files that it reads exist."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from train.benchmark.chain import Step

# Options for a program's output folder.
OUTPUT = ('--config.workdir', '--out')


def options(step: Step) -> Iterator[tuple[str, str]]:
    """Yield (option, value) of a command, however the value is attached."""
    before = ''
    for argument in step.arguments:
        name, equals, value = argument.partition('=')
        yield (name, value) if equals and name.startswith('--') else (before, argument)
        before = argument


def reads(step: Step) -> set[pathlib.Path]:
    """Return the files and folders that a command reads."""
    given = {pathlib.Path(value) for name, value in options(step) if name not in OUTPUT and value.startswith(os.sep)}
    return given | set(step.parts.values()) | set(step.after)


def writes(step: Step) -> set[pathlib.Path]:
    """Return the folders that a command writes; for the evaluation (--out: common folder), its result's folder."""
    if step.after:
        return {step.result.parent}
    return {pathlib.Path(value) for name, value in options(step) if name in OUTPUT} | set(step.parts)


def waits_for(step: Step, earlier: Step) -> bool:
    """Return whether a command reads something that an earlier one writes or adds to."""
    made = writes(earlier)
    return any(
        path in made or made & set(path.parents) or any(path in one.parents for one in made) for path in reads(step)
    )


def run_all(
    steps: Sequence[Step], jobs: int, run: Callable[[Step], float], on_done: Callable[[Step, float], object]
) -> None:
    """Run commands, each once and after those that it waits for; after a failure, start no others.

    Args:
      steps: in an order in which they could run one by one.
      jobs: number of steps at a time, each on its share of this machine's cores.
      run: function that runs one step in its own thread and returns the seconds.
      on_done: function called with each finished step and its seconds.
    Raises:
      Exception: the first failure, after the running steps have ended.
    """
    left = list(steps)
    running: dict[Future[float], Step] = {}
    failed: list[BaseException] = []
    with ThreadPoolExecutor(jobs, initializer=_take_cores, initargs=(shares(jobs),)) as pool:
        while running or (left and not failed):
            for step in ready(left, list(running.values())) if not failed else ():
                if len(running) < jobs:
                    left.remove(step)
                    running[pool.submit(run, step)] = step
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step = running.pop(future)
                if error := future.exception():
                    failed.append(error)
                else:
                    on_done(step, future.result())
    if failed:
        raise failed[0]


def ready(left: Sequence[Step], running: Sequence[Step]) -> list[Step]:
    """Return the steps that wait neither for a running step nor for one that has not begun."""
    return [
        step
        for number, step in enumerate(left)
        if not any(waits_for(step, other) for other in (*running, *left[:number]))
    ]


def shares(jobs: int) -> list[set[int]]:
    """Return the cores of each job; empty if the system does not report them, or has fewer cores than jobs."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []
    return [set(cores[job::jobs]) for job in range(jobs)] if len(cores) >= jobs > 1 else []


def _take_cores(left: list[set[int]]) -> None:
    """Bind this thread, and the programs it will start, to the next share of the cores."""
    if left:
        os.sched_setaffinity(0, left.pop())
