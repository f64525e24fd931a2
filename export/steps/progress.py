"""Progress of an export on standard output."""

from __future__ import annotations

import sys

import tqdm


class Progress:
    """A progress bar on a terminal, one line per step elsewhere."""

    def __init__(self, total: int) -> None:
        self._bar = tqdm.tqdm(total=total, unit='step', disable=not sys.stderr.isatty())
        self._total, self._done = total, 0

    def __call__(self, text: str) -> None:
        """Report a finished step."""
        self._done += 1
        if self._bar.disable:
            print(f'[{self._done}/{self._total}] {text}', flush=True)
        else:
            self._bar.set_description(text)
            self._bar.update()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
