"""A watch over the processes of a run: says within a minute which of them keeps the others waiting.

Every process publishes its step and its activity in workdir/.processes. A process that makes no progress looks at the
others, and names those that are behind.
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax

from neodragon_jax.base.atomic import atomic_file
from train.runtime.goodput import STEP

FOLDER = '.processes'
# Seconds between two looks, and without progress until the others are named.
PERIOD_S, QUIET_S = 5.0, 40.0


class Place(NamedTuple):
    """Where a process is.

    Attributes:
      step: that it is at.
      activity: such as 'step', 'compile', 'evaluation'.
      since: Unix time at which it arrived there.
    """

    process: int
    host: str
    pid: int
    step: int
    activity: str
    since: float


class Watch:
    """Publishes the place of this process, and names the slow ones; a single process needs none."""

    def __init__(self, workdir: pathlib.Path, activity: Callable[[], str], say: Callable[[str], object]) -> None:
        """Prepare.

        Args:
          activity: returns what the process is doing.
          say: shows a line to the user.
        """
        self._folder, self._activity, self._say = workdir / FOLDER, activity, say
        self._step, self._end = 0, threading.Event()
        self._place = self._here(time.time())
        self._thread = threading.Thread(target=self._look, name='watch', daemon=True)

    def at(self, step: int) -> None:
        """Note the step that begins."""
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
                line = complaint(self._place, self._others(), jax.process_count(), now)
                if line:
                    self._say(line)

    def _others(self) -> list[Place]:
        """Return the places of the other processes, as far as they can be read."""
        places = []
        for path in self._folder.glob('[0-9]*.json'):
            try:
                place = Place(**json.loads(path.read_text()))
            except (OSError, ValueError, TypeError):
                continue
            if place.process != self._place.process:
                places.append(place)
        return places


def complaint(here: Place, others: Sequence[Place], count: int, now: float) -> str:
    """Return a line that names the processes that are behind this one, or ''.

    Behind is a process at an earlier step; at the same step, one that does something else while this one computes, for
    a step needs all processes.
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
