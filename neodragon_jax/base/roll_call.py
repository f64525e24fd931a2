"""A check, before JAX's coordination starts, that all processes are present; a failure is reported with its reason.

JAX aborts a process after five minutes if a partner is missing or two have the same number. Therefore all processes
first connect to the port of the coordinator: process 0 listens, the others report. A waiting process prints the missing
ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import socket
import sys
import time
from collections.abc import Iterator

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import parse_json

# Environment variables that describe the run to a process without a cluster manager.
PROCESS_VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
# Seconds within which all processes must have started: by default, and at most.
START_TIMEOUT_S, LONGEST_TIMEOUT_S = 60.0, 86400.0
# Seconds between two lines that list the missing processes.
NOTICE_EVERY_S = 20.0
_RETRY_S, _LONGEST_LINE = 0.2, 4096
_MORE_TIME = 'give more time with --start-timeout (of a training, --config.loop.start_timeout_s)'


@dataclasses.dataclass(frozen=True)
class Reporter:
    """A process in the roll call."""

    index: int
    count: int
    host: str

    def __str__(self) -> str:
        return f'process {self.index} of {self.count} on {self.host}'


class _Timer:
    """Timer of the roll call: the remaining time, and the notices at intervals."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._start = self._told = time.monotonic()

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self._start + self.timeout_s - time.monotonic()

    def notice(self, text: str) -> None:
        """Print at intervals which processes are missing."""
        now = time.monotonic()
        if now - self._told >= NOTICE_EVERY_S:
            self._told = now
            print(f'{text} ({now - self._start:.0f} of {self.timeout_s:g} s)', file=sys.stderr, flush=True)


def roll_call(address: str, count: int, index: int, timeout_s: float) -> None:
    """Return when all processes have reported, within a moment of each other.

    Args:
      address: host:port of process 0.
      timeout_s: seconds after which a missing process is an error.
    Raises:
      InputError: the address cannot be used, a process is missing, two have the same number, or they disagree on the
        number of processes. Every process that has reported raises the same error.
    """
    host, _, port = address.rpartition(':')
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(f'JAX_COORDINATOR_ADDRESS is {address!r}; give host:port of process 0.')
    if count > 1:
        reporter = Reporter(index, count, socket.gethostname())
        timer = _Timer(timeout_s)
        _call(int(port), reporter, timer) if index == 0 else _report(host, int(port), reporter, timer)


def _call(port: int, first: Reporter, timer: _Timer) -> None:
    """Collect the reports of the other processes, and answer all of them."""
    present: dict[int, Reporter] = {0: first}
    error = ''
    with _listener(port) as listener, contextlib.ExitStack() as stack:
        connections: list[socket.socket] = []
        while len(present) < first.count and not error:
            missing = ', '.join(str(index) for index in range(first.count) if index not in present)
            timer.notice(f'waiting for process {missing} of {first.count} to start')
            if timer.left() <= 0:
                error = (
                    f'process {missing} of {first.count} did not start within {timer.timeout_s:g} s; look at its log, '
                    f'or {_MORE_TIME}.'
                )
                break
            with contextlib.suppress(TimeoutError, ValueError, OSError):
                connection = stack.enter_context(listener.accept()[0])
                connection.settimeout(5)
                reporter = parse_json(_line(connection), Reporter, 'report')
                connections.append(connection)
                error = _objection(reporter, present, first)
                present.setdefault(reporter.index, reporter)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps({'error': error}).encode() + b'\n')
                connection.recv(1)  # the other side closes first, which frees the port for JAX
    if error:
        raise InputError(error)


def _objection(reporter: Reporter, present: dict[int, Reporter], first: Reporter) -> str:
    """Return the objection to a report, or ''."""
    if reporter.count != first.count:
        return f'{reporter} and {first} do not agree on their number; set the same JAX_NUM_PROCESSES everywhere.'
    if reporter.index in present:
        other = present[reporter.index]
        return (
            f'process {reporter.index} was started twice, on {other.host} and on {reporter.host}; give every process '
            'its own JAX_PROCESS_ID.'
        )
    return ''


@contextlib.contextmanager
def _listener(port: int) -> Iterator[socket.socket]:
    """Yield a socket that listens on a port.

    Raises:
      InputError: the port cannot be used.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        listener = socket.create_server(('', port), family=family, dualstack_ipv6=both)
    except OSError as error:
        why = 'is in use' if error.errno == errno.EADDRINUSE else f'cannot be used ({error.strerror})'
        raise InputError(
            f'port {port} {why}; choose another one in JAX_COORDINATOR_ADDRESS, or end the run that holds it.'
        ) from None
    with listener:
        listener.settimeout(_RETRY_S)
        yield listener


def _report(host: str, port: int, reporter: Reporter, timer: _Timer) -> None:
    """Report to process 0, and wait for its answer."""
    message = json.dumps(dataclasses.asdict(reporter)).encode() + b'\n'
    unknown = ''
    while True:
        timer.notice(f'waiting for process 0 of {reporter.count} at {host}:{port}{unknown}')
        if timer.left() <= 0:
            raise InputError(
                f'process 0 of {reporter.count} did not answer at {host}:{port}{unknown} within {timer.timeout_s:g} s; '
                f'check that it runs, and that this is its address, or {_MORE_TIME}.'
            )
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                connection.sendall(message)
                connection.settimeout(max(timer.left(), 1) + 10)
                answer = parse_json(_line(connection), dict[str, str], 'answer')
        except socket.gaierror:
            # The name service of a cluster may not know a host that has just started.
            unknown = ', a host that is not known here,'
            time.sleep(_RETRY_S)
            continue
        except (OSError, ValueError):
            unknown = ''
            time.sleep(_RETRY_S)
            continue
        if answer.get('error'):
            raise InputError(answer['error'])
        return


def _line(connection: socket.socket) -> bytes:
    """Return the line that the other side sends.

    Raises:
      ValueError: it closes the connection instead, or sends a line that is too long.
    """
    with connection.makefile('rb') as file:
        line = file.readline(_LONGEST_LINE)
    if not line.endswith(b'\n'):
        raise ValueError('no line')
    return line
