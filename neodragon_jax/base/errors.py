"""The one exception that means: the input is wrong, here is which and what to do."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


class InputError(ValueError):
    """Bad input from the user. Its message is one line: the input, what is wrong, the remedy.

    Command-line programs print the message and exit with status 2, without a traceback.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean "x"?' for the nearest known word, or '' when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f' Did you mean "{near[0]}"?' if near else ''


def exit_status(program: Callable[[], object]) -> int:
    """Run a command-line program; bad input ends in one line on standard error and status 2, success in 0."""
    try:
        program()
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0
