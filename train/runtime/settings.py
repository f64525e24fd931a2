"""Settings files as frozen dataclasses, and frozen dataclasses as the defaults of settings files."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from neodragon_jax.base.errors import InputError, did_you_mean

T = TypeVar('T')

_TOP_LEVEL = 'top_level'


def top_level(default: Any = dataclasses.MISSING) -> Any:
    """Return a field of a section that takes the setting of its name from the top of the settings file.

    `defaults` leaves it out of the section, so that a value such as the seed is given once.
    """
    return dataclasses.field(default=default, metadata={_TOP_LEVEL: True})


def freeze(cls: type[T], values: Mapping[str, Any], where: str = 'config', top: Mapping[str, Any] | None = None) -> T:
    """Return a frozen dataclass with the given values; fields that are dataclasses are made from nested mappings.

    Args:
      where: path of `values` in the settings, for error messages.
      top: the settings at the top of the file, for fields made by `top_level`; by default `values`.
    Raises:
      InputError: a key is unknown or missing, or the dataclass refuses a value.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    top = values if top is None else top
    inherited = {name: top[name] for name, field in fields.items() if _TOP_LEVEL in field.metadata and name in top}
    values = inherited | dict(values)
    for key in values:
        if key not in fields:
            raise InputError(f'{where}.{key}: no such setting.{did_you_mean(key, fields)} Correct or remove it.')
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f'{where}.{name} is missing; set it.')
    types = typing.get_type_hints(cls)
    return cls(**{name: _converted(types[name], value, f'{where}.{name}', top) for name, value in values.items()})


def _converted(kind: Any, value: Any, where: str, top: Mapping[str, Any]) -> Any:
    """Return a value as its field stores it."""
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return freeze(typing.cast(type, kind), value, where, top)
    return tuple(value) if isinstance(value, list) else value


def defaults(cls: type, *left_out: str, **changes: Any) -> dict[str, Any]:
    """Return every setting of a frozen dataclass, so that a settings file shows them all and each can be overridden.

        'loop': defaults(LoopConfig, steps=5000, batch_size=8)

    Args:
      left_out: fields that the program fills in, besides those made by `top_level`.
      changes: other values than the defaults; required where there is no default, nested mappings for dataclasses.
    Raises:
      InputError: a change is no field of the dataclass.
    """
    fields = {
        field.name: field
        for field in dataclasses.fields(cls)
        if field.name not in left_out and _TOP_LEVEL not in field.metadata
    }
    for name in changes:
        if name not in fields:
            raise InputError(
                f'{cls.__name__}.{name}: no such setting.{did_you_mean(name, fields)} Correct or remove it.'
            )
    types, values = typing.get_type_hints(cls), {}
    for name, field in fields.items():
        if dataclasses.is_dataclass(types[name]):
            values[name] = defaults(typing.cast(type, types[name]), **changes.get(name, {}))
        elif name in changes:
            values[name] = changes[name]
        elif field.default is not dataclasses.MISSING:
            values[name] = field.default
        else:
            raise InputError(f'{cls.__name__}.{name} has no default; give a value, or leave it out.')
    return values


def require(settings: Mapping[str, Any] | ConfigDict, *names: str, **values: str) -> None:
    """Raise InputError if a setting without which a program cannot run is empty.

    Args:
      names: of folders.
      values: of other settings: what to give.
    """
    for name, value in {**dict.fromkeys(names, 'FOLDER'), **values}.items():
        if not settings[name]:
            raise InputError(f'config.{name} is empty; pass --config.{name}={value}.')
