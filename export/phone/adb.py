"""adb as functions: shell commands, pushed and pulled files, with errors of one line."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence

from neodragon_jax.base.errors import InputError


@dataclasses.dataclass(frozen=True)
class Phone:
    """A phone that adb reaches.

    Attributes:
      serial: as `adb devices` lists it.
      adb: program.
    """

    serial: str
    adb: str = 'adb'

    def check(self) -> None:
        """Raise InputError unless the phone is connected and has accepted this computer."""
        state = self._run(['get-state']).strip()
        if state != 'device':
            raise InputError(f'--serial {self.serial}: its state is {state!r}. Unlock it and accept USB debugging.')

    def shell(self, *command: str) -> str:
        """Run a command on the phone; return its output.

        Args:
          command: words, quoted here.
        Raises:
          InputError: the command fails.
        """
        return self._run(['shell', shlex.join(command)])

    def script(self, text: str, report: Callable[[str], object] = lambda line: None) -> str:
        """Run a line of shell script on the phone; return its output.

        Args:
          report: takes each line of the output as soon as it comes.
        """
        return self._run(['shell', text], report)

    def push(self, source: pathlib.Path, target: str) -> None:
        """Copy a file to the phone; its folder must exist."""
        self._run(['push', str(source), target])

    def pull(self, source: str, target: pathlib.Path) -> None:
        """Copy a file from the phone."""
        self._run(['pull', source, str(target)])

    def _run(self, arguments: Sequence[str], report: Callable[[str], object] = lambda line: None) -> str:
        command, lines = [self.adb, '-s', self.serial, *arguments], list[str]()
        # A file for errors, as a full second pipe would stop a program whose output is read line by line.
        with tempfile.TemporaryFile('w+') as errors:
            try:
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            except OSError as error:
                raise InputError(
                    f'--adb {self.adb}: cannot be run ({error.strerror}). Install platform-tools.'
                ) from None
            with process:
                for line in process.stdout or ():
                    lines.append(line)
                    report(line.rstrip('\n'))
            output = ''.join(lines)
            if process.returncode:
                errors.seek(0)
                reason = ' '.join((errors.read() or output).split())[-300:] or f'status {process.returncode}'
                raise InputError(f'adb {arguments[0]} on {self.serial}: {reason}')
        return output
