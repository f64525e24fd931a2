"""QNN sessions in a child process: compile a graph for the HTP and run it on the x86 simulator.

The QNN library can be registered only once per process, can crash the process, and needs gigabytes. A child process
(`htp_worker.py`) isolates the program from this, allows an exact measurement of peak memory, and turns a crash into an
error message.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import read_json

ROOT = pathlib.Path(__file__).parents[2]
_WORKER = 'export.qnn.htp_worker'
_NOT_WRITTEN = re.compile(r'No space left on device|Errno 28|Failed to write context')
_ERROR_LINE = re.compile(r'\[E:onnxruntime:[^\]]*\]\s*(?P<text>[^\x1b]+)')


@dataclasses.dataclass(frozen=True)
class Job:
    """A session that the child opens."""

    model: str
    options: Mapping[str, str]
    context: str | None
    sharing: bool = False  # with the binary of the jobs that follow
    last_sharing: bool = False


@dataclasses.dataclass(frozen=True)
class Opened:
    """Time and peak memory of opening a session."""

    seconds: float
    peak_gb: float


class _Child:
    """A process that opens QNN sessions; its output goes to a log that is read if it fails."""

    def __init__(self, label: str, folder: pathlib.Path | None = None) -> None:
        """Start the process.

        Args:
          label: subject of error messages.
          folder: folder of the binary that the process writes; None if it writes none.
        """
        self._label, self._folder = label, folder
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._pipe, child = multiprocessing.Pipe()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
        self.process = subprocess.Popen(
            [sys.executable, '-m', _WORKER, str(child.fileno())],
            pass_fds=[child.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=os.environ | {'PYTHONPATH': path},
        )
        child.close()

    def ask(self, doing: str, message: Any) -> Any:
        """Send a message and return the answer.

        Raises:
          InputError: the child reports an error or has ended; the message contains QNN's reasons.
        """
        answer = None
        try:
            self._pipe.send(message)
            error, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            status = self.process.wait()
            ending = signal.Signals(-status).name if status < 0 else f'status {status}'
            error = f'the QNN process ended with {ending}'
        if not error:
            return answer
        self._log.seek(0)
        raise InputError(self._explain(doing, error, self._log.read().decode(errors='replace')))

    def _explain(self, doing: str, error: str, log: str) -> str:
        """Return an error message with QNN's reasons and the remedy."""
        lines = [match['text'].strip() for match in _ERROR_LINE.finditer(log)]
        if not lines:  # possibly a Python error of the child; skip the simulator's banner
            lines = [line for line in log.splitlines() if line.strip() and 'LIBNATIVE' not in line][-1:]
        # Omit messages about the disabled fallback, a setting of this project; the unsupported nodes are the reason.
        reasons = [line for line in dict.fromkeys([*lines, error]) if 'fallback' not in line] or [error]
        summary = '; '.join(reasons).rstrip('.')
        if self._folder is not None and _NOT_WRITTEN.search(f'{summary} {log}'):
            free = shutil.disk_usage(self._folder).free / 1e9
            return f'{self._label}: {self._folder} ({free:.1f} GB free) is not writable: {summary}. Free space there.'
        if signal.SIGKILL.name in summary:
            return f'{self._label}: {summary}, as when memory runs out. Free memory, or export fewer graphs at a time.'
        return (
            f'{self._label}: the HTP does not {doing} this graph: {summary}. '
            'Change the operations named here, the precision, or the chipset.'
        )

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


class _InChild:
    """Base class of resources that live in a child process; closing them ends the process."""

    _child: _Child

    def peak_gb(self) -> float:
        """Return the peak memory of the child process so far."""
        return self._child.ask('run', None)

    def close(self) -> None:
        """End the child process."""
        self._child.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class HtpSession(_InChild):
    """A session that runs a graph entirely on the HTP; there is no fallback to the CPU.

    Attributes:
      opened: time and peak memory of compiling (or of loading a context binary).
    """

    def __init__(self, model: pathlib.Path, options: Mapping[str, str], context: pathlib.Path | None = None) -> None:
        """Compile a graph, or load a compiled one.

        Args:
          model: ONNX file; a wrapper of a context binary is loaded instead of compiled.
          options: of the QNN provider.
          context: where to write the wrapper of the context binary; the binary goes beside it.
        Raises:
          InputError: the graph does not compile (with QNN's reasons), or it shares its binary with other graphs.
        """
        _refuse_shared(model)
        self._child = _Child(model.name, context and context.parent)
        self._process = self._child.process
        try:
            job = Job(str(model.resolve()), dict(options), str(context.resolve()) if context else None)
            self.opened: Opened = self._child.ask('compile', [job])
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph once on the simulator.

        Raises:
          InputError: the run failed or the library ended the process.
        """
        return self._child.ask('run', (0, dict(feeds)))


class HtpContext(_InChild):
    """Several graphs in one context binary that stores equal weights once; they run in the process that compiled it.

    The x86 library of onnxruntime-qnn 2.7.0 writes such a binary but cannot load it with any options ("Shared weights
    buffer isn't supported on this platform", error 1000, followed by a SIGSEGV in the provider). The compiling process
    holds the same context in memory and can run all its graphs.

    Attributes:
      opened: time and peak memory of compiling all graphs.
    """

    def __init__(self, graphs: Mapping[str, SharedGraph]) -> None:
        """Compile graphs into one binary; it goes beside the wrappers.

        Raises:
          InputError: a graph does not compile, with QNN's reasons.
        """
        jobs = [
            Job(str(graph.model.resolve()), dict(graph.options), str(graph.wrapper.resolve()), sharing=True)
            for graph in graphs.values()
        ]
        jobs[-1] = dataclasses.replace(jobs[-1], last_sharing=True)
        folder = next(iter(graphs.values())).wrapper.parent
        self._child = _Child(', '.join(graph.model.name for graph in graphs.values()), folder)
        self._places = {name: number for number, name in enumerate(graphs)}
        try:
            self.opened: Opened = self._child.ask('compile', jobs)
        except BaseException:
            self.close()
            raise

    def run(self, name: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one of the graphs once on the simulator.

        Raises:
          InputError: the run failed or the library ended the process.
        """
        return self._child.ask('run', (self._places[name], dict(feeds)))

    def runner(self, name: str) -> ContextGraph:
        """Return one of the graphs; it lives as long as this context."""
        return ContextGraph(self, name)


@dataclasses.dataclass(frozen=True)
class SharedGraph:
    """A graph to compile into a shared context: ONNX file, wrapper to write, options of the QNN provider."""

    model: pathlib.Path
    wrapper: pathlib.Path
    options: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class ContextGraph:
    """One graph of a shared context, as a `runners.GraphRunner`."""

    context: HtpContext
    name: str

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph once on the simulator."""
        return self.context.run(self.name, feeds)


def _refuse_shared(model: pathlib.Path) -> None:
    """Raise InputError if a file wraps a graph of a shared context, which no simulator session can load."""
    metadata = model.with_name('metadata.json')
    if metadata.is_file() and len(read_json(metadata, dict[str, Any]).get('graphs', ())) > 1:
        raise InputError(
            f'{model}: the x86 simulator cannot load a binary of several graphs, only a phone can. '
            'Run its graphs in the process that compiles them (HtpContext), or export with --separate-contexts.'
        )
