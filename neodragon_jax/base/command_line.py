"""Command lines: options that are paths, and the boundary at which failures become one line and an exit status."""

from __future__ import annotations

import argparse
import errno
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from neodragon_jax.base.cpu_compilation import compile_faster_on_cpus
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.jax_platform import no_platform
from neodragon_jax.base.paths import has_scheme, storage_path, user_path
from neodragon_jax.base.roll_call import LONGEST_TIMEOUT_S, PROCESS_VARIABLES, START_TIMEOUT_S

SUCCESS, WRONG_INPUT, FAILED_FILE, INTERRUPTED, CLOSED_OUTPUT = 0, 2, 3, 130, 141
EXIT_CODES = """exit status:
  0    success
  2    wrong input: an option, a checkpoint or a file; the line on standard error names it and the remedy
  3    the system refused a file: no space, no permission, a read-only disk, too many open files
  130  interrupted with Ctrl-C; finished files are complete, and the same command continues from them
  141  the reader of the output, such as head, closed it before the work was finished
  1    any other failure, with a traceback: please report it"""

_REMEDIES = {
    errno.ENOSPC: 'no space is left on the disk; free some, or choose another folder.',
    errno.EDQUOT: 'the disk quota is used up; free some space, or choose another folder.',
    errno.EACCES: 'permission denied; choose another path, or change its permissions.',
    errno.EPERM: 'the operation is not permitted; choose another path, or change its permissions.',
    errno.EROFS: 'the disk is read-only; choose another folder.',
    errno.ENOENT: 'no such file or folder; correct the path.',
    errno.ENOTDIR: 'a part of the path is a file, not a folder; correct the path.',
    errno.EISDIR: 'this is a folder; give the path of a file.',
    errno.ENAMETOOLONG: 'the path is too long; choose a shorter one.',
    errno.EMFILE: 'too many open files; raise the limit with `ulimit -n 65536`.',
    errno.ENOTEMPTY: 'the folder is not empty; choose another one.',
    errno.EIO: 'the disk cannot be read or written; check it.',
    errno.EFBIG: 'the file is larger than the limit; raise it with `ulimit -f unlimited`, or choose another disk.',
    errno.ELOOP: 'links form a circle; correct the path.',
    errno.ESTALE: 'the network disk has lost the file; mount it again.',
}


class PathOption(argparse.Action):
    """Option that is a path: its value is the `pathlib.Path` of `user_path`, also that of a default.

    With `bucket` it may be in a bucket, and its value is that of `storage_path`. With `append` it may be repeated, and
    its value is a list. Addresses of the schemes in `names`, such as 'hf', stay
    text for the program to look up.
    """

    def __init__(
        self, *args: Any, append: bool = False, bucket: bool = False, names: tuple[str, ...] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._append, self._bucket, self._names = append, bucket, names
        if isinstance(self.default, str):
            self.default = pathlib.Path(self.default)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the path.

        Raises:
          InputError: the text is not a local path.
        """
        name = option_string or str(self.metavar or self.dest)
        value = [self._path(text, name) for text in values] if isinstance(values, list) else self._path(values, name)
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), value] if self._append else value)

    def _path(self, text: str, name: str) -> Any:
        """Return the path of one text, or the text if it is a name that is looked up later."""
        read = storage_path if self._bucket else user_path
        return text if has_scheme(text, self._names) else read(text, name)


def command_parser(command: str, description: str, examples: str = '', status: str = '') -> argparse.ArgumentParser:
    """Return the parser of a command; its --help ends with the examples and the exit status.

    Args:
      command: the command as typed, such as 'python -m train.latents'.
      description: one sentence on the result of the command.
      examples: text below the options, with line breaks: a purpose and a command line each, and any notes.
      status: another line of EXIT_CODES, such as '1    a graph is below its target'.
    """
    head, success, *failures = EXIT_CODES.splitlines()
    table = '\n'.join((head, success, *([f'  {status}'] if status else []), *failures))
    return argparse.ArgumentParser(
        command,
        description=description.strip(),
        epilog='\n\n'.join(part for part in (examples.strip(), table) if part),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_checkpoint(add: Callable[..., Any]) -> None:
    """Add the required option --checkpoint, a folder or a name."""
    add('--checkpoint', action=PathOption, names=('hf',), bucket=True, required=True, metavar='DIR|NAME',
        help='root of a checkpoint in the released layout, the name of one that is installed with this package, or one '
        'of the Hugging Face hub, hf://ORG/NAME@REVISION')  # fmt: skip


def add_distributed(add: Callable[..., Any], purpose: str = 'this is one of several processes') -> None:
    """Add the options of a command that several processes may run together: --distributed and --start-timeout.

    Args:
      purpose: beginning of the help text of --distributed.
    """
    add('--distributed', action='store_true',
        help=f'{purpose}; they find each other on a TPU pod, under Slurm or Open MPI, else set '
        f'{", ".join(PROCESS_VARIABLES)}')  # fmt: skip
    add('--start-timeout', type=_seconds, default=START_TIMEOUT_S, metavar='S', dest='start_timeout_s',
        help='seconds within which all of these processes must have started (default: %(default)g)')  # fmt: skip


def _seconds(text: str) -> float:
    """Return a positive number of seconds from the command line."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= LONGEST_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number of seconds up to {LONGEST_TIMEOUT_S:g}')
    return value


def exit_status(program: Callable[[], object]) -> int:
    """Run a command; return its exit status, see EXIT_CODES. A failure that the user can fix prints one line.

    Every command begins here, so that here the level is set at which programs compile on CPUs.

    Args:
      program: returns the exit status as an int, or anything else for success.
    """
    compile_faster_on_cpus()
    try:
        status = program()
        _flush()
    except InputError as error:
        return _fail(str(error), WRONG_INPUT)
    except BrokenPipeError:
        # The reader of the output has closed it, as `head` does. Nothing can be written to it, including at exit.
        sys.stdout = None
        return _fail(
            'the reader of the output closed it before the work was finished; finished files are complete. The same '
            'command continues from them.',
            CLOSED_OUTPUT,
        )
    except OSError as error:
        # Without a file, an error that is not in the table may be of any other cause.
        if error.errno not in _REMEDIES and (error.errno is None or not error.filename):
            raise
        where = f'{error.filename}: ' if error.filename else ''
        remedy = _REMEDIES.get(error.errno, f'{error.strerror}; choose another path, or check the disk.')
        return _fail(f'{where}{remedy}', FAILED_FILE)
    except KeyboardInterrupt:
        return _fail('interrupted; finished files are complete. The same command continues from them.', INTERRUPTED)
    except Exception as error:
        if reason := no_platform(error):
            return _fail(reason, WRONG_INPUT)
        raise
    return status if type(status) is int else SUCCESS


def _flush() -> None:
    """Write the last output of a finished command. A reader that has closed it by now is no failure."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None


def _fail(message: str, status: int) -> int:
    """Print one line to standard error, with any characters in its paths; return the status."""
    line = ' '.join(message.splitlines())
    print('error: ' + line.encode('utf-8', 'backslashreplace').decode(), file=sys.stderr)
    return status
