"""Error boundary of every command: a failure that the user can fix prints one line and has a documented status."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable

from neodragon_jax.base.errors import InputError

SUCCESS, WRONG_INPUT, FAILED_FILE, INTERRUPTED = 0, 2, 3, 130
EXIT_CODES = """exit status:
  0    success
  2    wrong input: an option, a checkpoint or a file; the line on standard error names it and the remedy
  3    the system refused a file: no space, no permission, a read-only disk, too many open files
  130  interrupted with Ctrl-C; finished files are complete, and the same command continues from them
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
}


def command_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Return the parser of a command; its --help ends with the examples and the exit status.

    Args:
      command: the command as typed, such as 'python -m train.latents'.
      description: one sentence on the result of the command.
      examples: text below the options, with line breaks: a purpose and a command line each, and any notes.
    """
    return argparse.ArgumentParser(
        command,
        description=description,
        epilog=f'{examples.strip()}\n\n{EXIT_CODES}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def exit_status(program: Callable[[], object]) -> int:
    """Run a command; return its exit status, see EXIT_CODES. A failure that the user can fix prints one line."""
    try:
        program()
    except InputError as error:
        return _fail(str(error), WRONG_INPUT)
    except BrokenPipeError:
        # The reader of the output has closed it, as `head` does. Nothing can be written to it, including at exit.
        sys.stdout = None
        return SUCCESS
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        where = f'{error.filename}: ' if error.filename else ''
        return _fail(f'{where}{_REMEDIES[error.errno]}', FAILED_FILE)
    except KeyboardInterrupt:
        return _fail('interrupted; finished files are complete. The same command continues from them.', INTERRUPTED)
    return SUCCESS


def _fail(message: str, status: int) -> int:
    """Print one line to standard error, with any characters in its paths; return the status."""
    line = ' '.join(message.splitlines())
    print('error: ' + line.encode('utf-8', 'backslashreplace').decode(), file=sys.stderr)
    return status
