"""Watchdog of the processes of a run: reports within a minute which of them keeps the others waiting.

Every process publishes in workdir/.processes its step, its activity, its place in the code, and whether it waits for
the others. A process that makes no progress reads those of the others, and reports the processes that are behind.
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.bucket import StoragePath
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import parse_json
from train.runtime.goodput import STEP

FOLDER = '.processes'
# Seconds between two checks, and seconds without progress until a report. A process that has not published for longer
# than SILENT_S has ended, or its host has.
PERIOD_S, QUIET_S, SILENT_S = 5.0, 40.0, 60.0
# Functions, also of Orbax and JAX, in which a process waits for all others.
WAITS = ('wait_for_processes', 'sync_global_processes', 'broadcast_one_to_all', 'process_allgather')
_PROJECT = pathlib.Path(__file__).parents[2]


class Place(NamedTuple):
    """Progress of a process.

    Attributes:
      step: the current step.
      activity: the current activity, such as 'step', 'compile', 'evaluation'.
      where: line of this project that the process executes, such as 'train/runtime/loop.py:120 run'.
      waiting: whether it waits there for the other processes.
      since: Unix time at which the activity began.
      seen: Unix time at which this was published.
    """

    process: int
    host: str
    pid: int
    step: int
    activity: str
    where: str
    waiting: bool
    since: float
    seen: float


class Watch:
    """Publisher of this process's progress that reports slow processes; a single process needs none."""

    def __init__(self, workdir: StoragePath, activity: Callable[[], str], print_line: Callable[[str], object]) -> None:
        """Store the arguments.

        Args:
          activity: returns the current activity of the process.
          print_line: prints a line for the user.
        """
        self._folder, self._activity, self._print_line = workdir / FOLDER, activity, print_line
        self._step, self._end, self._main = 0, threading.Event(), threading.get_ident()
        now = time.time()
        self._place = self._here(now, now)
        self._thread = threading.Thread(target=self._look, name='watch', daemon=True)

    def at(self, step: int) -> None:
        """Record the step that begins."""
        self._step = step

    def __enter__(self) -> Self:
        if jax.process_count() > 1:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._publish(self._place)
            self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        (self._folder / f'{self._place.process}.json').unlink(missing_ok=True)

    def _here(self, since: float, now: float) -> Place:
        """Return the progress of this process."""
        where, waiting = position(sys._current_frames().get(self._main))
        host, pid = socket.gethostname(), os.getpid()
        return Place(jax.process_index(), host, pid, self._step, self._activity(), where, waiting, since, now)

    def _publish(self, place: Place) -> None:
        with atomic_file(self._folder / f'{place.process}.json') as path:
            path.write_text(json.dumps(place._asdict()))
        self._place = place

    def _look(self) -> None:
        told = 0.0
        while not self._end.wait(PERIOD_S):
            try:
                told = self._look_once(time.time(), told)
            except Exception as error:  # a lost connection to a bucket; the next look may succeed
                self._print_line(f'the progress of process {jax.process_index()} could not be published ({error})')

    def _look_once(self, now: float, told: float) -> float:
        """Publish what has changed, and report who is behind; return the time of the last report."""
        here = self._here(self._place.since, now)
        if progress(here) != progress(self._place):
            self._publish(here._replace(since=now))
        elif here.where != self._place.where or now - self._place.seen >= SILENT_S / 3:
            self._publish(here)
        if now - max(self._place.since, told) < QUIET_S:
            return told
        line = delay_message(self._place, self._others(), jax.process_count(), now)
        if line:
            self._print_line(line)
        return now

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


def progress(place: Place) -> tuple[int, str, bool]:
    """Return the part of a place that changes when its process makes progress."""
    return place.step, place.activity, place.waiting


def position(frame: types.FrameType | None) -> tuple[str, bool]:
    """Return the innermost line of this project in a stack, and whether the stack waits for other processes."""
    where, waiting = '', False
    while frame is not None:
        code = frame.f_code
        waiting = waiting or code.co_name in WAITS
        path = pathlib.Path(code.co_filename)
        inside = path.is_relative_to(_PROJECT) and 'site-packages' not in path.parts
        if not where and inside and code.co_name not in WAITS:
            where = f'{path.relative_to(_PROJECT)}:{frame.f_lineno} {code.co_name}'
        frame = frame.f_back
    return where, waiting


def delay_message(here: Place, others: Sequence[Place], count: int, now: float) -> str:
    """Return a line that names the processes behind this one, or ''.

    A process is behind if it is at an earlier step. At the same step it is behind if it does not wait while this one
    does, or if it has another activity while this one computes, because a step needs all processes.
    """
    heard = [place for place in others if now - place.seen < SILENT_S]
    absent = set(range(count)) - {here.process, *(place.process for place in heard)}
    names = [f'process {index}, which has not reported' for index in sorted(absent)]
    for place in sorted(heard):
        computes = here.activity == STEP and not here.waiting and place.activity != STEP
        same = place.step == here.step and not place.waiting and (here.waiting or computes)
        if place.step < here.step or same:
            told = f'{place.activity} at step {place.step} for {now - place.since:.0f} s, in {place.where}'
            names.append(f'process {place.process} ({place.host}, pid {place.pid}): {told}')
    if not names:
        return ''
    waits = 'has waited' if here.waiting else 'has been'
    waited = f'process {here.process} {waits} at step {here.step} ({here.activity}) for {now - here.since:.0f} s'
    return f'{waited}; behind it: {"; ".join(names)}'
