"""The exception for wrong input: its message names the input and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Error for bad input from the user. Its message is one line: the input, the problem, the remedy.

    Command-line programs print the message and exit with status 2, without a traceback.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean "x"?' for the nearest known word, or '' when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f' Did you mean "{near[0]}"?' if near else ''
