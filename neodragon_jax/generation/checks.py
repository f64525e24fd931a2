"""Types of options that a caller gives: each check returns the value in its plain Python type."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from numbers import Real
from typing import Any

from neodragon_jax.base.errors import InputError, did_you_mean
from neodragon_jax.base.json_file import shown
from neodragon_jax.base.text import BadText, clean, is_unicode


def whole_number(name: str, value: Any, limits: tuple[int, int] | None = None) -> int:
    """Return an integer, within limits if there are any; NumPy's are accepted, truth values and floats are not."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (limits is not None and not limits[0] <= number <= limits[1]):
        allowed = f' from {limits[0]} to {limits[1]}' if limits else ''
        raise InputError(f'{name} is {shown(value)}; give a whole number{allowed}.')
    return number


def real_number(name: str, value: Any, most: float) -> float:
    """Return a number from 0 to `most`."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) <= most:
        raise InputError(f'{name} is {shown(value)}; give a number from 0 to {most:g}.')
    return float(value)


def text(name: str, value: Any) -> str:
    """Return a text of valid Unicode; a command line in another encoding gives surrogates."""
    if not isinstance(value, str):
        raise InputError(f'{name} is of type {type(value).__name__}; give a text.')
    if not is_unicode(value):
        raise InputError(f'{name} {value!r} is not valid UTF-8; type it in a UTF-8 terminal.')
    return value


def prompts(values: Any) -> list[str]:
    """Return a list of cleaned prompts."""
    # A single text is also a sequence of texts, one per character.
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise InputError(f'prompts is of type {type(values).__name__}; give a list of texts, such as [prompt].')
    return [prompt(f'prompts[{index}]', value) for index, value in enumerate(values)]


def prompt(name: str, value: Any) -> str:
    """Return a prompt, cleaned as those of files are: the same text gives the same video, however it is given."""
    given = text(name, value)
    try:
        return clean(given, 'text')
    except BadText as problem:
        raise InputError(f'{name} {given[:200]!r}: {problem}; correct it.') from None


def choice(name: str, value: Any, known: Sequence[str]) -> str:
    """Return one of some words."""
    if not isinstance(value, str) or value not in known:
        hint = did_you_mean(value, known) if isinstance(value, str) else ''
        raise InputError(f'{name} {shown(value)} is unknown.{hint} Use {" or ".join(known)}.')
    return value


def truth(name: str, value: Any) -> bool:
    """Return a truth value."""
    if not isinstance(value, bool):
        raise InputError(f'{name} is {shown(value)}; give True or False.')
    return value


def path(name: str, value: Any) -> str | os.PathLike[str]:
    """Return a path or a name."""
    if not isinstance(value, str | os.PathLike):
        raise InputError(f'{name} is {shown(value)}; give a path.')
    return value


def picture(name: str, value: Any) -> Any:
    """Return the path of a picture, or an array, whose shape and type are checked where it is used."""
    if not (isinstance(value, str | os.PathLike) or (hasattr(value, 'shape') and hasattr(value, 'dtype'))):
        raise InputError(
            f'{name} is of type {type(value).__name__}; give a file or RGB bytes, such as '
            "numpy.asarray(image.convert('RGB')) of a picture of Pillow."
        )
    return value
