"""Progress of a long loop: a bar on a terminal, else one line a minute, which is readable in a log file."""

from __future__ import annotations

import sys
from typing import Any

import tqdm

# Seconds between two lines without a terminal; shorter loops print none.
LINE_EVERY_S = 60.0


class ProgressBar(tqdm.tqdm):
    """A tqdm bar on standard error."""

    def __init__(self, *args: Any, hidden: bool = False, **kwargs: Any) -> None:
        """Begin; arguments as of `tqdm.tqdm`.

        Args:
          hidden: show nothing, as in all processes of a run but the first.
        """
        self._lines = not sys.stderr.isatty()
        if self._lines:
            every = LINE_EVERY_S
            kwargs |= {'mininterval': every, 'maxinterval': every, 'delay': every, 'miniters': 1, 'leave': False}
        super().__init__(*args, disable=hidden, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or print the line."""
        if not self._lines:
            super().display(msg, pos)
        elif msg is None:
            state = self.format_dict
            rate, done, total = state['rate'], state['n'], state['total']
            name = f'{state["prefix"].removesuffix(": ")}: ' if state['prefix'] else ''
            of = f' of {total}' if total else ''
            left = f', {self.format_interval((total - done) / rate)} left' if rate and total else ''
            print(f'{name}{done}{of} {state["unit"]}s{left}', file=sys.stderr, flush=True)
