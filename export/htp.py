"""One QNN session in a process of its own: compile a graph for the HTP, run it on the x86 simulator.

The QNN library registers itself once per process, can end the process, and needs gigabytes: a child process keeps all
that away from the program, gives an exact peak memory, and turns a crash into an error message.

Run as a module, this file is the child: `python -m export.htp FD` serves one session on the pipe FD.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import numpy as np

from neodragon_jax.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent
PROVIDER = 'QNNExecutionProvider'
_ERROR_LINE = re.compile(r'\[E:onnxruntime:[^\]]*\]\s*(?P<text>[^\x1b]+)')


@dataclasses.dataclass(frozen=True)
class _Job:
    """What the child is to open."""

    model: str
    options: Mapping[str, str]
    context: str | None


@dataclasses.dataclass(frozen=True)
class Opened:
    """What opening a session took."""

    seconds: float
    peak_gb: float


class HtpSession:
    """A graph wholly on the HTP, or no session at all: nothing falls back to the CPU.

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
          InputError: the graph does not compile, with QNN's reasons.
        """
        self._model = model
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._pipe, child = multiprocessing.Pipe()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
        self._process = subprocess.Popen(
            [sys.executable, '-m', 'export.htp', str(child.fileno())],
            pass_fds=[child.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=os.environ | {'PYTHONPATH': path},
        )
        child.close()
        try:
            job = _Job(str(model), dict(options), str(context) if context else None)
            self.opened: Opened = self._ask('compile', job)
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph once on the simulator.

        Raises:
          InputError: the run failed or the library ended the process.
        """
        return self._ask('run', dict(feeds))

    def close(self) -> None:
        """End the child process."""
        self._pipe.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, doing: str, message: Any) -> Any:
        """Return the child's answer, or raise InputError with everything known about why there is none."""
        answer = None
        try:
            self._pipe.send(message)
            error, answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            status = self._process.wait()
            ending = signal.Signals(-status).name if status < 0 else f'status {status}'
            error = f'the QNN process ended with {ending}'
        if not error:
            return answer
        self._log.seek(0)
        log = self._log.read().decode(errors='replace')
        lines = [match['text'].strip() for match in _ERROR_LINE.finditer(log)]
        if not lines:  # a Python error of the child's, perhaps; the simulator's banner says nothing
            lines = [line for line in log.splitlines() if line.strip() and 'LIBNATIVE' not in line][-1:]
        # That nothing may fall back is our own setting; the nodes that would are the reason.
        reasons = [line for line in dict.fromkeys([*lines, error]) if 'fallback' not in line] or [error]
        summary = '; '.join(reasons).rstrip('.')
        raise InputError(
            f'{self._model.name}: the HTP does not {doing} this graph: {summary}. '
            'Change the operations named here, the precision, or the chipset.'
        )


def _serve(pipe: Connection) -> None:
    """Open the session that the parent asks for, then run it as often as asked; answers are (error, value)."""
    try:
        start = time.monotonic()
        session = _open(pipe.recv())
        pipe.send(('', Opened(time.monotonic() - start, _peak_gb())))
        names = [value.name for value in session.get_outputs()]
        while True:
            pipe.send(('', dict(zip(names, session.run(names, pipe.recv()), strict=True))))
    except EOFError:
        return
    except Exception as error:  # whatever it is, the parent reports it
        pipe.send((' '.join(str(error).split()), None))


def _peak_gb() -> float:
    """Return the peak memory of this process.

    From /proc, because getrusage also counts the moment when a new process is still a copy of its parent.
    """
    status = pathlib.Path('/proc/self/status').read_text()
    (kibibytes,) = re.findall(r'VmHWM:\s+(\d+) kB', status)
    return int(kibibytes) * 1024 / 1e9


def _open(job: _Job) -> Any:
    """Open a session on the HTP without any fallback."""
    import onnxruntime
    import onnxruntime_qnn

    onnxruntime.set_default_logger_severity(3)  # errors: they name the nodes that QNN refuses
    onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry('session.disable_cpu_ep_fallback', '1')
    if job.context:
        settings.add_session_config_entry('ep.context_enable', '1')
        settings.add_session_config_entry('ep.context_embed_mode', '0')
        settings.add_session_config_entry('ep.context_file_path', job.context)
    options = {'backend_path': onnxruntime_qnn.get_qnn_htp_path(), **job.options}
    settings.add_provider_for_devices(devices[:1], options)
    return onnxruntime.InferenceSession(job.model, sess_options=settings)


if __name__ == '__main__':
    # Under its importable name, so that what travels through the pipe unpickles on the other side.
    from export import htp

    htp._serve(Connection(int(sys.argv[1])))
    sys.stdout.flush()
    # The library's own clean-up can crash after all work is done.
    os._exit(0)
