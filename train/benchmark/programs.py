"""Running the programs of the chain: their output in log files, their seconds, and how they stop together."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping

from neodragon_jax.base.atomic import atomic_file, atomic_folder
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import read_json
from neodragon_jax.checkpoint.fingerprint import fingerprint
from train.benchmark import record
from train.benchmark.chain import Step

# Lines of a failed program's output that are shown.
SHOWN = 15


class Programs:
    """The programs of the chain that run now.

    Attributes:
      environment: variables of every program.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self._running: list[subprocess.Popen[bytes]] = []
        self._stopped = False
        self._times = threading.Lock()

    def run(self, step: Step, folder: pathlib.Path) -> float:
        """Run a program until it ends; return the seconds it took, which are noted whether or not it succeeds.

        Args:
          folder: of the seed. The output goes to `folder/logs`, the seconds to `folder/times.json`.
        Raises:
          InputError: it failed, or it was stopped before its result was there.
        """
        copy_parts(step)
        log = folder / 'logs' / f'{step.name}.txt'
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        try:
            status = self._status(step, log)
        finally:
            seconds = time.monotonic() - start
            with self._times:
                note_time(folder / 'times.json', step.name, seconds)
        if status:
            tail = '\n'.join(log.read_text(errors='replace').splitlines()[-SHOWN:])
            raise InputError(
                f'step {step.name} failed with status {status}; its output is in {log}. Correct '
                f'the cause and run the same command again: it continues there. The last lines:\n{tail}'
            )
        if not step.result.is_file():  # a training that gets SIGTERM saves and ends with status 0
            raise InputError(
                f'step {step.name} was stopped before its end; its output is in {log}. Run the same command again: it '
                'continues there.'
            )
        return seconds

    @contextlib.contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Let SIGTERM and the first Ctrl-C stop all programs, which save; the second one kills them.

        Raises:
          KeyboardInterrupt: in the main thread, at the first signal.
        """

        def stop(number: int, frame: object) -> None:
            del number, frame
            again, self._stopped = self._stopped, True
            for program in tuple(self._running):
                if again:
                    program.kill()
                else:
                    program.terminate()
            if not again:
                print('stopping: trainings save first; press Ctrl-C again to stop at once.', file=sys.stderr)
                raise KeyboardInterrupt

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _status(self, step: Step, log: pathlib.Path) -> int:
        """Run a program, its output in a log file; return its exit status."""
        command = [sys.executable, '-m', step.module, *step.arguments]
        with log.open('a') as file:
            file.write(f'$ python -m {step.module} {shlex.join(step.arguments)}\n')
            file.flush()
            program = subprocess.Popen(
                command, cwd=record.ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT
            )
        self._running.append(program)
        if self._stopped:  # a signal came before this program was in the list
            program.terminate()
        try:
            return program.wait()
        finally:
            self._running.remove(program)


def copy_parts(step: Step) -> None:
    """Copy the components that a program reads into its checkpoint, where they differ."""
    for target, source in step.parts.items():
        if not target.is_dir() or fingerprint(target) != fingerprint(source):
            with atomic_folder(target, replace=True) as partial:
                shutil.copytree(source, partial, dirs_exist_ok=True)


def note_time(path: pathlib.Path, name: str, seconds: float) -> None:
    """Add the seconds of a step to those of earlier attempts."""
    times = read_json(path, dict[str, float]) if path.is_file() else {}
    times[name] = times.get(name, 0.0) + seconds
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(times, indent=1) + '\n')
