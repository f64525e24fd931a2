"""Watchdog of the processes of a run: reports within a minute which of them keeps the others waiting.

Every process publishes its step and its activity in workdir/.processes. A process that makes no progress reads those of
the others, and reports the processes that are behind.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.bucket import StoragePath
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import parse_json
from train.runtime.goodput import STEP

FOLDER = '.processes'
# Seconds between two checks, and seconds without progress until a report.
PERIOD_S, QUIET_S = 5.0, 40.0


class Place(NamedTuple):
    """Progress of a process.

    Attributes:
      step: the current step.
      activity: the current activity, such as 'step', 'compile', 'evaluation'.
      since: Unix time at which the activity began.
    """

    process: int
    host: str
    pid: int
    step: int
    activity: str
    since: float


class Watch:
    """Publisher of this process's progress that reports slow processes; a single process needs none."""

    def __init__(self, workdir: StoragePath, activity: Callable[[], str], print_line: Callable[[str], object]) -> None:
        """Store the arguments.

        Args:
          activity: returns the current activity of the process.
          print_line: prints a line for the user.
        """
        self._folder, self._activity, self._print_line = workdir / FOLDER, activity, print_line
        self._step, self._end = 0, threading.Event()
        self._place = self._here(time.time())
        self._thread = threading.Thread(target=self._look, name='watch', daemon=True)

    def at(self, step: int) -> None:
        """Record the step that begins."""
        self._step = step

    def __enter__(self) -> Self:
        if jax.process_count() > 1:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._publish()
            self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        (self._folder / f'{self._place.process}.json').unlink(missing_ok=True)

    def _here(self, since: float) -> Place:
        return Place(jax.process_index(), socket.gethostname(), os.getpid(), self._step, self._activity(), since)

    def _publish(self) -> None:
        with atomic_file(self._folder / f'{self._place.process}.json') as path:
            path.write_text(json.dumps(self._place._asdict()))

    def _look(self) -> None:
        told = 0.0
        while not self._end.wait(PERIOD_S):
            now = time.time()
            here = self._here(self._place.since)
            if here != self._place:
                self._place = here._replace(since=now)
                self._publish()
            elif now - max(self._place.since, told) >= QUIET_S:
                told = now
                line = delay_message(self._place, self._others(), jax.process_count(), now)
                if line:
                    self._print_line(line)

    def _others(self) -> list[Place]:
        """Return the progress of the other processes, as far as it can be read."""
        places = []
        for path in self._folder.glob('[0-9]*.json'):
            try:
                place = parse_json(path.read_text(), Place, str(path))
            except (OSError, InputError):
                continue
            if place.process != self._place.process:
                places.append(place)
        return places


def delay_message(here: Place, others: Sequence[Place], count: int, now: float) -> str:
    """Return a line that names the processes behind this one, or ''.

    A process is behind if it is at an earlier step, or if it is at the same step but has another activity while this
    one computes, because a step needs all processes.
    """
    absent = set(range(count)) - {here.process, *(place.process for place in others)}
    names = [f'process {index}, which has not reported' for index in sorted(absent)]
    for place in sorted(others):
        same = place.step == here.step and here.activity == STEP and place.activity != STEP
        if place.step < here.step or same:
            told = f'{place.activity} at step {place.step} for {now - place.since:.0f} s'
            names.append(f'process {place.process} ({place.host}, pid {place.pid}): {told}')
    if not names:
        return ''
    waited = f'process {here.process} has been at step {here.step} ({here.activity}) for {now - here.since:.0f} s'
    return f'{waited}; behind it: {"; ".join(names)}'
