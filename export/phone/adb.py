"""adb as functions: shell commands, pushed and pulled files, with errors of one line."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
import subprocess
from collections.abc import Sequence

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

    def script(self, text: str) -> str:
        """Run a line of shell script on the phone; return its output."""
        return self._run(['shell', text])

    def push(self, source: pathlib.Path, target: str) -> None:
        """Copy a file to the phone; its folder must exist."""
        self._run(['push', str(source), target])

    def pull(self, source: str, target: pathlib.Path) -> None:
        """Copy a file from the phone."""
        self._run(['pull', source, str(target)])

    def _run(self, arguments: Sequence[str]) -> str:
        command = [self.adb, '-s', self.serial, *arguments]
        try:
            run = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise InputError(f'--adb {self.adb}: cannot be run ({error.strerror}). Install platform-tools.') from None
        if run.returncode:
            reason = ' '.join((run.stderr or run.stdout).split())[-300:] or f'status {run.returncode}'
            raise InputError(f'adb {arguments[0]} on {self.serial}: {reason}')
        return run.stdout
