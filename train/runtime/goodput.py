"""Wall-clock time of a run by purpose, and the share of it that trains (goodput)."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator

# START is loading, and the creation or restoration of the state; STEP is everything without another purpose.
START, COMPILE, CHECKPOINT, EVALUATION, DATA = 'start', 'compile', 'checkpoint', 'evaluation', 'data wait'
STEP = 'step'


class Goodput:
    """Seconds since the start of a run, by purpose; all remaining time counts as training."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start the clock."""
        self._clock, self._start = clock, clock()
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self.activity = STEP

    @contextlib.contextmanager
    def spending(self, purpose: str) -> Iterator[None]:
        """Attribute the time inside the block to a purpose; blocks do not nest."""
        began, self.activity = self._clock(), purpose
        try:
            yield
        finally:
            self._seconds[purpose] += self._clock() - began
            self.activity = STEP

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return self._clock() - self._start

    def outside_steps(self) -> float:
        """Return the seconds in which no step could run; waits for data count as steps."""
        return sum(seconds for purpose, seconds in self._seconds.items() if purpose != DATA)

    def fraction(self) -> float:
        """Return the share of the time spent on training, 0..1, without waits for data."""
        elapsed = self.elapsed()
        return 1 - sum(self._seconds.values()) / elapsed if elapsed > 0 else 0.0

    def describe(self) -> str:
        """Return one line: the goodput, and the seconds of every other purpose."""
        others = ', '.join(f'{purpose} {seconds:.1f} s' for purpose, seconds in self._seconds.items())
        return f'goodput {self.fraction():.1%} of {self.elapsed():.1f} s' + (f'; {others}' if others else '')


def speed(steps: int, seconds: float, flops: float, devices: int, peak: float | None) -> dict[str, float]:
    """Return the speed metrics of a window of steps.

    Args:
      flops: FLOPs of all steps on all devices.
      peak: FLOP/s of one device, or None if unknown; then `mfu` is left out.
    """
    rate = flops / seconds / devices
    metrics = {'steps_per_second': steps / seconds, 'tflops_per_device': rate / 1e12}
    return metrics | ({} if peak is None else {'mfu': rate / peak})
