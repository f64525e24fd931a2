"""Run several processes on this machine, each with virtual CPU devices, to test multi-host programs without a pod.

    python -m train.launch --processes 2 --devices 4 -- train.dmd --config=configs/dmd.py:tiny --config.data=DATA

After the two dashes comes a module, or a file that ends in .py, and its arguments. The launcher sets
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Every line of output begins with the number of its
process.

SIGTERM, SIGINT and SIGUSR1 (which requests a trace) are forwarded. When one process fails, the others are ended. No
process outlives the launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

from neodragon_jax.base.command_line import command_parser, exit_status
from neodragon_jax.base.errors import InputError

# Seconds after a failure in which the other processes may report the same error.
GRACE = 5.0
POLL = 0.05
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# From linux/prctl.h: the signal sent to a process when its parent dies.
PR_SET_PDEATHSIG = 1


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options, and as `command` the arguments after the two dashes.

    Raises:
      InputError: there is no command, or a number is not positive.
    """
    own, command = list(argv), []
    if '--' in own:
        split = own.index('--')
        own, command = own[:split], own[split + 1 :]
    failed = 'N    that of the first process that failed, or 128 + the number of the signal that killed it'
    parser = command_parser('python -m train.launch', str(__doc__), status=failed)
    parser.usage = '%(prog)s [--processes N] [--devices N] -- MODULE [ARGUMENT ...]'
    parser.add_argument('--processes', type=int, default=2, metavar='N', help='processes (default: %(default)s)')
    parser.add_argument(
        '--devices', type=int, default=4, metavar='N', help='virtual CPU devices of each process (default: %(default)s)'
    )
    args = parser.parse_args(own)
    for name in ('processes', 'devices'):
        if getattr(args, name) < 1:
            raise InputError(f'--{name} is {getattr(args, name)}; give at least 1.')
    if not command:
        raise InputError('no program to launch; give it after two dashes: -- train.dmd --config=configs/dmd.py:tiny.')
    args.command = command
    return args


def launch(command: Sequence[str], processes: int, devices: int) -> int:
    """Run a program in several processes until all have ended; return the status of the job.

    Args:
      command: a module, or a file that ends in .py, and its arguments.
      devices: virtual CPU devices of each process.
    """
    program = command[:1] if command[0].endswith('.py') else ['-m', command[0]]
    job = [sys.executable, *program, *command[1:]]
    shared = {
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': str(devices),
        'JAX_COORDINATOR_ADDRESS': f'localhost:{_free_port()}',
        'JAX_NUM_PROCESSES': str(processes),
        'PYTHONUNBUFFERED': '1',
    }
    children: list[subprocess.Popen[bytes]] = []
    readers: list[threading.Thread] = []
    with _forwarding(children):
        try:
            for index in range(processes):
                child = _start(job, os.environ | shared | {'JAX_PROCESS_ID': str(index)})
                children.append(child)
                readers += _readers(child, f'[{index}] '.encode())
            return _wait(children)
        finally:
            for child in children:
                child.kill()
            for child in children:
                child.wait()
            for reader in readers:
                reader.join(timeout=GRACE)


def _start(job: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in its own session, so that signals of the terminal reach it through this process only."""
    parent, library = os.getpid(), ctypes.CDLL(None) if sys.platform == 'linux' else None

    def follow_parent() -> None:
        if library is not None:
            library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # the parent died before the request
                os._exit(1)

    return subprocess.Popen(
        job,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=follow_parent,
    )


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Return 0 when all have succeeded, or the status of the first failure without waiting for the rest."""
    while True:
        running = [child for child in children if child.poll() is None]
        failed = {index: child.returncode for index, child in enumerate(children) if child.returncode}
        if failed:
            # Report a signal-killed process first; the others fail because it is gone.
            first = min(failed, key=lambda index: failed[index] > 0)
            return _report(first, failed[first], children)
        if not running:
            return 0
        time.sleep(POLL)


def _report(index: int, status: int, children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Print which process failed, wait briefly for the others to end, and return the status of the job."""
    how = f'was killed by {signal.Signals(-status).name}' if status < 0 else f'failed with status {status}'
    print(f'launch: process {index} of {len(children)} {how}; ending the others.', file=sys.stderr, flush=True)
    deadline = time.monotonic() + (GRACE if status > 0 else 0)
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(POLL)
    return 128 - status if status < 0 else status


@contextlib.contextmanager
def _forwarding(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Forward signals to the processes."""

    def forward(number: int, frame: object) -> None:
        del frame
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _readers(child: subprocess.Popen[bytes], prefix: bytes) -> list[threading.Thread]:
    """Start threads that show the output of a process, each line with a prefix."""
    pairs = ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer))
    threads = [threading.Thread(target=_show, args=(*pair, prefix), daemon=True) for pair in pairs]
    for thread in threads:
        thread.start()
    return threads


def _show(lines: IO[bytes], sink: IO[bytes], prefix: bytes) -> None:
    """Copy lines, each in one write, so that lines of two processes do not mix."""
    for line in lines:
        sink.write(prefix + line.rstrip(b'\r\n') + b'\n')
        sink.flush()


def _free_port() -> int:
    """Return an unused port."""
    with socket.socket() as listener:
        listener.bind(('localhost', 0))
        return listener.getsockname()[1]


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""

    def status() -> int:
        args = parse_args(argv)
        return launch(args.command, args.processes, args.devices)

    return exit_status(status)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
