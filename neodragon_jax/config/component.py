"""Base of the component configs: conversion from and to `config.json`, with the type and range of every value."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field

from neodragon_jax.base.errors import InputError, did_you_mean
from neodragon_jax.base.json_file import SHOWN, checked, shown

# Ranges of config fields. The upper ends are far above every published model; a damaged number beyond them would
# exhaust the memory or time of any machine.
Width = Annotated[int, Field(ge=1, le=2**16)]  # channels, features, dimensions
Count = Annotated[int, Field(ge=1, le=256)]  # layers, heads, levels: things that code loops over
Side = Annotated[int, Field(ge=1, le=2**13)]  # pixels, latents, positions
Vocabulary = Annotated[int, Field(ge=1, le=2**20)]
TokenId = Annotated[int, Field(ge=0, lt=2**20)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]  # probability of a dropout
Positive = Annotated[float, Field(gt=0)]

LEVELS = Field(min_length=1, max_length=16)  # of a tuple with one entry per level
Widths = Annotated[tuple[Width, ...], LEVELS]
Counts = Annotated[tuple[Count, ...], LEVELS]
Layers = Annotated[tuple[Annotated[int, Field(ge=0, le=256)], ...], LEVELS]  # a level may have none
Flags = Annotated[tuple[bool, ...], LEVELS]
Rates = Annotated[tuple[Rate, ...], LEVELS]
Names = Annotated[tuple[str, ...], LEVELS]


def require(config: Any, **allowed: Any) -> None:
    """Raise InputError if a field that selects an architecture has a value that is not implemented."""
    for name, values in allowed.items():
        value = getattr(config, name)
        if value not in values:
            raise InputError(
                f'{type(config).__name__}.{name} is {shown(value)}; supported: {", ".join(map(repr, values))}. '
                'The checkpoint needs another architecture than the released one.'
            )


def require_lengths(config: Any, like: str, *names: str) -> None:
    """Raise InputError unless tuples have as many entries as the field `like`."""
    count = len(getattr(config, like))
    for name in names:
        if len(getattr(config, name)) != count:
            raise InputError(
                f'{type(config).__name__}.{name} has {len(getattr(config, name))} entries, {like} has {count}; '
                'give one for each level.'
            )


def require_divisor(config: Any, divisor: str, *names: str) -> None:
    """Raise InputError unless the field `divisor` divides other fields, or all of their entries."""
    number = getattr(config, divisor)
    for name in names:
        value = getattr(config, name)
        if any(entry % number for entry in (value if isinstance(value, tuple) else (value,))):
            raise InputError(
                f'{type(config).__name__}.{divisor} {number} does not divide {name} {shown(value)}; change one of them.'
            )


Config = TypeVar('Config', bound='ComponentConfig')


@dataclasses.dataclass(frozen=True)
class ComponentConfig:
    """Base of all component configs: checks of the fields, conversion from and to `config.json`."""

    # Written to `config.json` besides the fields, because the reference implementation reads them.
    constant_keys: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    # Diffusers writes only constructor arguments, so an unknown key is an error. Transformers adds dozens of generic
    # keys, so there only a near miss of a known key is an error.
    strict_keys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise InputError unless every field has the type and range of its annotation; subclasses add rules."""
        for name, kind in _field_types(type(self)).items():
            checked(getattr(self, name), kind, source='', key=f'{type(self).__name__}.{name}')

    @classmethod
    def from_json(cls: type[Config], values: Mapping[str, Any], source: str) -> Config:
        """Build from the content of a `config.json`.

        Args:
          values: the parsed file. Keys that start with an underscore are metadata.
          source: the file's path, for error messages.
        Raises:
          InputError: a key is unknown or missing, or a value is not supported.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key in fields or key.startswith('_'):
                continue
            hint = did_you_mean(key, set(fields) - set(values))
            if cls.strict_keys or hint:
                raise InputError(f'{source}: unknown key {json.dumps(key)[:SHOWN]}.{hint} Correct or remove it.')
        missing = [
            name
            for name, field in fields.items()
            if name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise InputError(f'{source}: missing key "{missing[0]}". Add it, or copy the file from the release again.')
        try:
            return cls(**{name: _freeze(values[name]) for name in fields if name in values})
        except InputError as error:
            raise InputError(f'{source}: {error}') from None

    def to_json(self) -> dict[str, Any]:
        """Return the content of `config.json`, without metadata keys."""
        return {
            **self.constant_keys,
            **{field.name: _thaw(getattr(self, field.name)) for field in dataclasses.fields(self)},
        }


@functools.cache
def _field_types(config: type[ComponentConfig]) -> Mapping[str, Any]:
    """Return the annotated type of every field."""
    kinds = typing.get_type_hints(config, include_extras=True)
    return {field.name: kinds[field.name] for field in dataclasses.fields(config)}


def _freeze(value: Any) -> Any:
    """Return nested lists as nested tuples."""
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def _thaw(value: Any) -> Any:
    """Return nested tuples as nested lists."""
    return list(map(_thaw, value)) if isinstance(value, list | tuple) else value
