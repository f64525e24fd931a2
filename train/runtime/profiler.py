"""Traces of steps on demand, for TensorBoard's profile plugin, XProf or Perfetto.

`kill -USR1 PID` requests a trace of the next steps of a running process, or of its first steps while it prepares;
`LoopConfig.profile_steps` selects steps in advance. A trace appears in workdir/profile when complete; view it with
`tensorboard --logdir workdir/profile`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from typing import Any, Self

import jax

from neodragon_jax.base.atomic import atomic_folder
from neodragon_jax.base.bucket import StoragePath

# Steps of a trace started by a signal: the first shows the host's dispatch, the others the steady state.
STEPS_ON_SIGNAL = 3

# Signals that no step has answered yet; a list, because a handler must not wait for a lock.
_requests: list[int] = []


def note_requests() -> Callable[[], Any]:
    """Note SIGUSR1 from now on, for the next steps of a run; return a function that restores the handler.

    A program calls it when it starts: the default action of the signal would end a process that still reads data or
    compiles. Only the main thread can set handlers; elsewhere, and on systems without the signal, nothing changes.
    """
    if not hasattr(signal, 'SIGUSR1') or threading.current_thread() is not threading.main_thread():
        return lambda: None
    before = signal.signal(signal.SIGUSR1, lambda number, _: _requests.append(number))
    return lambda: signal.signal(signal.SIGUSR1, before)


class Profiler:
    """Profiler of selected steps of a run; call `before` and `after` around each step."""

    def __init__(self, folder: StoragePath, steps: tuple[int, ...], print_line: Callable[[str], None]) -> None:
        """Store the arguments.

        Args:
          folder: gets one folder per trace.
          steps: (first, last) steps to trace, or ().
          print_line: prints a line for the user.
        """
        self._folder, self._print_line = folder, print_line
        self._first, self._last = steps or (0, 0)
        self._trace: contextlib.ExitStack | None = None
        self._restore: Callable[[], Any] = lambda: None

    def before(self, step: int) -> None:
        """Begin a trace if one is due at this step."""
        if self._trace is not None:
            return
        if _requests:
            _requests.clear()
            self._first, self._last = step, step + STEPS_ON_SIGNAL - 1
        if self._first <= step <= self._last:
            self._begin(step)

    def after(self, step: int, results: Any) -> None:
        """End the trace after its last step, once the results are computed."""
        if self._trace is not None and step >= self._last:
            jax.block_until_ready(results)
            self._end()

    def _begin(self, step: int) -> None:
        process = f'-process-{jax.process_index()}' if jax.process_count() > 1 else ''
        folder = self._folder / f'steps-{step}-{self._last}{process}'
        self._trace = contextlib.ExitStack()
        self._trace.callback(self._print_line, f'profile of steps {step} to {self._last}: {folder}')
        partial = self._trace.enter_context(atomic_folder(folder, replace=True))
        jax.profiler.start_trace(partial)
        self._trace.callback(jax.profiler.stop_trace)

    def _end(self) -> None:
        assert self._trace is not None
        trace, self._trace = self._trace, None
        trace.close()

    def __enter__(self) -> Self:
        self._restore = note_requests()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._restore()
        if self._trace is not None:
            self._end()
