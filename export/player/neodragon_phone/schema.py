"""A small description language for JSON documents, and a checker that names the first wrong value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

from neodragon_phone.errors import BundleError

# Arrays and counts larger than any video needs are refused before memory is allocated.
MOST = 2**31 - 1


class Kind(Protocol):
    """Checks one value."""

    def check(self, value: Any, path: str) -> None:
        """Raise BundleError if the value is of another kind; `path` names it."""
        ...


@dataclasses.dataclass(frozen=True)
class Text:
    """A string, of a fixed set if `one_of` is not empty."""

    one_of: tuple[str, ...] = ()

    def check(self, value: Any, path: str) -> None:
        if not isinstance(value, str) or (self.one_of and value not in self.one_of):
            raise wrong(path, value, f'one of {", ".join(self.one_of)}' if self.one_of else 'a text')


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole number in a range."""

    low: int = 0
    high: int = MOST

    def check(self, value: Any, path: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            raise wrong(path, value, f'a whole number from {self.low} to {self.high}')


@dataclasses.dataclass(frozen=True)
class Number:
    """A finite number of moderate size."""

    def check(self, value: Any, path: str) -> None:
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if not ok or (isinstance(value, int) and abs(value) > MOST) or not math.isfinite(value) or abs(value) > 1e9:
            raise wrong(path, value, 'a number')


@dataclasses.dataclass(frozen=True)
class Flag:
    """true or false."""

    def check(self, value: Any, path: str) -> None:
        if not isinstance(value, bool):
            raise wrong(path, value, 'true or false')


@dataclasses.dataclass(frozen=True)
class Optional:
    """null, or a value of a kind."""

    kind: Kind

    def check(self, value: Any, path: str) -> None:
        if value is not None:
            self.kind.check(value, path)


@dataclasses.dataclass(frozen=True)
class Items:
    """A list of values of one kind."""

    kind: Kind
    least: int = 0
    most: int = 1 << 16

    def check(self, value: Any, path: str) -> None:
        if not isinstance(value, list) or not self.least <= len(value) <= self.most:
            raise wrong(path, value, f'a list of {self.least} to {self.most} values')
        for index, item in enumerate(value):
            self.kind.check(item, f'{path}[{index}]')


@dataclasses.dataclass(frozen=True)
class Table:
    """An object with any keys and values of one kind."""

    kind: Kind

    def check(self, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise wrong(path, value, 'an object')
        for key, item in value.items():
            self.kind.check(item, f'{path}.{key}')


@dataclasses.dataclass(frozen=True)
class Record:
    """An object with known keys; further ones are ignored.

    Attributes:
      required, optional: kinds of the values by key.
    """

    required: Mapping[str, Kind]
    optional: Mapping[str, Kind] = dataclasses.field(default_factory=dict)

    def check(self, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise wrong(path, value, 'an object')
        for key, kind in self.required.items():
            if key not in value:
                raise BundleError(f'manifest.json: "{_at(path, key)}" is missing. {REMEDY}')
            kind.check(value[key], _at(path, key))
        for key, kind in self.optional.items():
            if key in value:
                kind.check(value[key], _at(path, key))


REMEDY = 'Copy the bundle again.'


def wrong(path: str, value: Any, wanted: str) -> BundleError:
    """Return the error of a value that is not as wanted."""
    text = repr(value)
    shown = text if len(text) <= 40 else text[:37] + '...'
    return BundleError(f'manifest.json: "{path[:80]}" is {shown}, not {wanted}. {REMEDY}')


def _at(path: str, key: str) -> str:
    return f'{path}.{key}' if path else key
