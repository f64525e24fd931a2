"""JSON files and their values, read strictly: every error names file, key, value and remedy in one line.

All JSON of the project is read here; a test enforces it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any, TypeVar

import pydantic

from neodragon_jax.base.atomic import PathLike
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.text import is_unicode

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 32
MAX_DIGITS = 100  # of one number
SHOWN = 60  # characters of a value in a message
_REMEDY = 'Copy the file again.'

_STRICT = pydantic.ConfigDict(strict=True, allow_inf_nan=False)

T = TypeVar('T')


class _TooLong(str):
    """A number with more than MAX_DIGITS digits, unparsed."""

    __slots__ = ()


def read_json(path: PathLike, kind: type[T], max_bytes: int = MAX_BYTES) -> T:
    """Return the content of a JSON file.

    Args:
      path: the file.
      kind: type of the content, such as `dict[str, Any]`, or a dataclass with the fields of an object; numbers are not
        taken for strings or booleans, nor the reverse.
      max_bytes: largest size of the file.
    Raises:
      InputError: the file is missing, too large or not valid JSON; it holds a key twice, a number that is not finite or
        has more than MAX_DIGITS digits, or more than MAX_DEPTH levels; the content is not of the type.
    """
    path = pathlib.Path(path)
    try:
        with path.open('rb') as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f'{path}: cannot be read ({error.strerror}). {_REMEDY}') from None
    return parse_json(data, kind, str(path), max_bytes)


def parse_json(data: bytes | str, kind: type[T], source: str, max_bytes: int = MAX_BYTES) -> T:
    """Return the value of a JSON text, such as a line of a file.

    Args:
      source: the file, with the line if there are several, for messages.
    Raises:
      InputError: as of `read_json`.
    """
    if len(data) > max_bytes:
        raise InputError(f'{source}: larger than {max_bytes:,} bytes. {_REMEDY}')
    value = _parse(data, source)
    _check_values(source, value)
    return checked(value, kind, source)


def parse_own_json(data: bytes) -> Any:
    """Return the value of a JSON text that this program wrote to itself, for instance from another process.

    Nothing is checked: as Python's JSON, it may have numbers that are not finite.
    """
    return json.loads(data)


def as_json(value: Any) -> Any:
    """Return a value as it is after writing and reading it as JSON: tuples become lists, keys become texts."""
    return json.loads(json.dumps(value))


def checked(value: Any, kind: Any, source: str, key: str = '') -> Any:
    """Return a value after checking its type; lists and tuples are interchangeable.

    Args:
      kind: a type; `Annotated[int, pydantic.Field(ge=1)]` limits the range.
      source: the file or object that holds the value, for messages.
      key: the value's key there.
    Raises:
      InputError: the value is not of the type.
    """
    try:
        # As JSON, which has only one list type. Values without a JSON type become text, which matches no other type.
        return _adapter(kind).validate_json(json.dumps(value, default=repr), strict=True, extra='forbid')
    except pydantic.ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
    place, got = _found(value, errors[0]['loc'])
    rules = {item['msg'] for item in errors if _found(value, item['loc'])[0] == place}
    rule = ' or '.join(sorted(rules)).replace('Input should be', 'it must be').replace('or it must be', 'or')
    if errors[0]['type'] == 'missing':
        place, found = (*place, errors[0]['loc'][-1]), 'is missing; it is required'
    else:
        found = f'is {shown(got)}; {rule}'
    prefix = f'{source}: ' if source else ''
    raise InputError(f'{prefix}{_place(key, place)} {found}. Correct it, or copy the file again.')


def _found(value: Any, location: tuple[int | str, ...]) -> tuple[tuple[int | str, ...], Any]:
    """Return the part of a location that exists in a value, and the value there; pydantic adds union type names."""
    place: list[int | str] = []
    part: Any
    for part in location:
        keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list | tuple) else ()
        if part in keys:
            value = value[part]
            place.append(part)
    return tuple(place), value


def shown(value: Any) -> str:
    """Return a value in one line of at most SHOWN characters."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(_thawed(value))
    text = ' '.join(text.split())
    return text if len(text) <= SHOWN else f'{text[: SHOWN - 3]}...'


@functools.lru_cache(maxsize=1024)
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    # A dataclass takes no configuration here; `checked` is strict in any case.
    own = dataclasses.is_dataclass(kind)
    return pydantic.TypeAdapter(kind, config=None if own else _STRICT)


def _parse(data: bytes | str, source: str) -> Any:
    """Return the parsed text with lists as lists."""
    try:
        text = data if isinstance(data, str) else data.decode('utf-8')
        return json.loads(text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_real)
    except RecursionError:
        raise InputError(f'{source}: more than {MAX_DEPTH} levels of lists and objects. {_REMEDY}') from None
    except UnicodeDecodeError as error:
        raise InputError(f'{source}: not UTF-8 at byte {error.start}. {_REMEDY}') from None
    except ValueError as error:
        raise InputError(f'{source}: not valid JSON ({" ".join(str(error).split())}). {_REMEDY}') from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object whose keys are all different."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'key {shown(key)} appears twice')
        found[key] = value
    return found


def _integer(text: str) -> int | str:
    return int(text) if len(text) <= MAX_DIGITS else _TooLong(text)


def _real(text: str) -> float | str:
    return float(text) if len(text) <= MAX_DIGITS else _TooLong(text)


def _check_values(source: str, value: Any) -> None:
    """Raise InputError for a value that is nested too deep, a number that no program writes, or half a character."""
    pending: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while pending:
        place, value = pending.pop()
        if isinstance(value, dict):
            pending += [((*place, key), item) for key, item in value.items()]
            strings = list(value)
        elif isinstance(value, list):
            pending += [((*place, index), item) for index, item in enumerate(value)]
            strings = []
        else:
            strings = [value] if isinstance(value, str) else []
        problem = ''
        if len(place) > MAX_DEPTH:
            problem = f'is nested more than {MAX_DEPTH} levels deep'
        elif isinstance(value, _TooLong):
            problem = f'is a number of {len(value):,} digits; at most {MAX_DIGITS} are read'
        elif isinstance(value, float) and not math.isfinite(value):
            problem = f'is {value}; it must be a finite number'
        elif not all(map(is_unicode, strings)):
            problem = 'has a character that is not valid Unicode'
        if problem:
            raise InputError(f'{source}: {_place("", place[: MAX_DEPTH // 4])} {problem}. Correct it.')


def _place(key: str, path: tuple[Any, ...]) -> str:
    """Return the place of a value as it is written in Python: key.inner[0]."""
    for part in path:
        if isinstance(part, int):
            key += f'[{part}]'
        elif part.isidentifier():
            key += f'.{part}' if key else part
        else:
            key += f'[{shown(part)}]'
    return key or 'the content'


def _thawed(value: Any) -> Any:
    """Return nested tuples as nested lists."""
    return list(map(_thawed, value)) if isinstance(value, list | tuple) else value
