"""Conversion between settings files and frozen dataclasses.

`freeze` makes dataclasses from settings: it checks names, types, lengths and that numbers are finite. Each dataclass
checks the ranges of its fields with `check_range`. `defaults` makes settings from dataclasses.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from ml_collections import ConfigDict

from neodragon_jax.base.errors import InputError, did_you_mean
from neodragon_jax.base.paths import has_scheme, storage_path

T = TypeVar('T')

_TOP_LEVEL = 'top_level'
_LOCAL, _CHECKPOINT = 'local', 'checkpoint'

# Text settings that are paths: `freeze` stores the path of `storage_path`, and refuses others. '' is none.
PathText = Annotated[str, _LOCAL]
# A path, or the name of a checkpoint: a shipped one, or one of the Hugging Face hub.
CheckpointText = Annotated[str, _CHECKPOINT]


def top_level(default: Any = dataclasses.MISSING) -> Any:
    """Return a field of a section whose value is the top-level setting of the same name.

    `defaults` leaves it out of the section, so that a value such as the seed is given only once.
    """
    return dataclasses.field(default=default, metadata={_TOP_LEVEL: True})


def no_such_setting(where: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error for an unknown name in a section.

    Args:
      where: path of the section, such as 'config.loop'.
      known: the names in the section.
    """
    return InputError(f'{where}.{name}: no such setting.{did_you_mean(name, known)} Correct or remove it.')


def freeze(cls: type[T], values: Mapping[str, Any], where: str = 'config', top: Mapping[str, Any] | None = None) -> T:
    """Return a frozen dataclass with the given values; nested mappings become nested dataclasses.

    Args:
      where: path of `values` in the settings, for error messages.
      top: the top-level settings, for fields made by `top_level`; by default `values`.
    Raises:
      InputError: a key is unknown or missing, or a value is invalid.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    top = values if top is None else top
    inherited = {name: top[name] for name, field in fields.items() if _TOP_LEVEL in field.metadata and name in top}
    values = inherited | dict(values)
    for key in values:
        if key not in fields:
            raise no_such_setting(where, key, fields)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f'{where}.{name} is missing; set it.')
    types = typing.get_type_hints(cls, include_extras=True)
    converted = {name: _converted(types[name], value, f'{where}.{name}', top) for name, value in values.items()}
    try:
        return cls(**converted)
    except InputError as error:
        raise InputError(_with_place(str(error), cls.__name__, fields, where)) from None


def _with_place(message: str, section: str, fields: Mapping[str, Any], where: str) -> str:
    """Return the message of a section, which does not know its place in the settings, with that place at its begin.

    Args:
      section: name of its class, which classes of the library begin their messages with.
      fields: name -> field of the section.
      where: path of the section in the settings.
    """
    top = where.partition('.')[0]
    if message.startswith(f'{top}.'):
        return message
    message = re.sub(rf'^{section}(\.|: )', '', message)
    field = fields.get(re.split(r'\W', message, maxsplit=1)[0])
    if field is None:
        return f'{where}: {message}'
    return f'{top if _TOP_LEVEL in field.metadata else where}.{message}'


def _converted(kind: Any, value: Any, where: str, top: Mapping[str, Any]) -> Any:
    """Return a value as its field stores it.

    Raises:
      InputError: its type is not the field's, a tuple has another length, or a number is not finite.
    """
    if dataclasses.is_dataclass(kind):
        if isinstance(value, typing.cast(type, kind)):
            return value
        if not isinstance(value, Mapping):
            raise InputError(f'{where} is {value!r}; it is a section, set its settings one by one.')
        return freeze(typing.cast(type, kind), value, where, top)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        if arguments[1] not in (_LOCAL, _CHECKPOINT):
            return _converted(arguments[0], value, where, top)
        _check_type(arguments[0], value, where)
        named = not value or (arguments[1] == _CHECKPOINT and has_scheme(value, ('hf',)))
        return value if named else str(storage_path(value, where))
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return _converted(kind, value, where, top)
    if origin is tuple:
        return _tuple(arguments, value, where, top)
    _check_type(kind, value, where)
    return tuple(value) if isinstance(value, list) else value


def _tuple(kinds: tuple[Any, ...], values: Any, where: str, top: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a tuple whose elements have the given types; (kind, ...) is of any length."""
    if not isinstance(values, list | tuple):
        raise InputError(f'{where} is {values!r}; give a tuple, such as (1, 2).')
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(values)
    if len(values) != len(kinds):
        raise InputError(f'{where} is {tuple(values)!r}; give {len(kinds)} values.')
    pairs = enumerate(zip(kinds, values, strict=True))
    return tuple(_converted(kind, value, f'{where}[{place}]', top) for place, (kind, value) in pairs)


# Names of types in messages. An int is accepted as a float; a bool is accepted as neither.
_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), 'True or False'),
    int: ((int,), 'a whole number'),
    float: ((int, float), 'a number'),
    str: ((str,), 'a text'),
}


def _check_type(kind: Any, value: Any, where: str) -> None:
    """Raise InputError unless a value has a plain type and, as a number, is finite."""
    if kind not in _TYPES:
        return
    accepted, name = _TYPES[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f'{where} is {value!r}; give {name}.')
    if kind is float and not math.isfinite(value):
        raise InputError(f'{where} is {value!r}; give a finite number.')


def check_range(
    options: Any,
    *names: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Raise InputError unless fields of a dataclass lie in a range; of tuples, all elements must.

    Args:
      least, most: inclusive bounds.
      above, below: exclusive bounds.
    """
    bounds = [
        (least, 'at least', lambda value, bound: value >= bound),
        (above, 'greater than', lambda value, bound: value > bound),
        (most, 'at most', lambda value, bound: value <= bound),
        (below, 'less than', lambda value, bound: value < bound),
    ]
    given = [(bound, text, holds) for bound, text, holds in bounds if bound is not None]
    for name in names:
        value = getattr(options, name)
        values = value if isinstance(value, tuple) else (value,)
        # In this form a NaN fails the check.
        if not all(holds(each, bound) for each in values for bound, _, holds in given):
            must = ' and '.join(f'{text} {bound}' for bound, text, _ in given)
            raise InputError(f'{name} is {value}; it must be {must}.')


def defaults(cls: type, *left_out: str, **changes: Any) -> dict[str, Any]:
    """Return all settings of a frozen dataclass, so that a settings file lists them and each can be overridden.

        'loop': defaults(LoopConfig, steps=5000, batch_size=8)

    Args:
      left_out: fields that the program fills in, besides those made by `top_level`.
      changes: values that differ from the defaults; required for fields without a default, nested mappings for
        dataclasses.
    Raises:
      InputError: a change is not a field of the dataclass.
    """
    fields = _shown_fields(cls, changes, left_out)
    types, values = typing.get_type_hints(cls), {}
    for name, field in fields.items():
        if dataclasses.is_dataclass(types[name]):
            values[name] = _section(field, typing.cast(type, types[name]), changes.get(name, {}))
        elif name in changes:
            values[name] = changes[name]
        elif field.default is not dataclasses.MISSING:
            values[name] = field.default
        else:
            raise InputError(f'{cls.__name__}.{name} has no default; give a value, or leave it out.')
    return values


def _section(field: dataclasses.Field[Any], cls: type, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a nested dataclass: those of the field's own default, with changes."""
    if field.default_factory is dataclasses.MISSING:
        return defaults(cls, **changes)
    return _values(field.default_factory(), changes)


def _values(instance: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an instance, with changes."""
    fields = _shown_fields(type(instance), changes)
    nested = {name: getattr(instance, name) for name in fields}
    return {
        name: _values(value, changes.get(name, {})) if dataclasses.is_dataclass(value) else changes.get(name, value)
        for name, value in nested.items()
    }


def _shown_fields(cls: type, changes: Mapping[str, Any], left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields that a settings file lists.

    Raises:
      InputError: a change is not one of them.
    """
    fields = {
        field.name: field
        for field in dataclasses.fields(cls)
        if field.name not in left_out and _TOP_LEVEL not in field.metadata
    }
    for name in changes:
        if name not in fields:
            raise no_such_setting(cls.__name__, name, fields)
    return fields


def preset_of(
    file: str,
    base: Mapping[str, Any],
    presets: Mapping[str, Sequence[Mapping[str, Any]]],
    name: str,
    first: str = 'full',
) -> ConfigDict:
    """Return the settings of a preset, the text after the colon of --config=FILE:PRESET.

    Args:
      base: all settings of the preset `first`, which is the default.
      presets: the differences of each preset, applied in turn.
    Raises:
      InputError: there is no such preset.
    """
    known = {first: (), **presets}
    name = name or first
    if name not in known:
        raise InputError(f'{file}:{name}: no such preset.{did_you_mean(name, known)} Use one of {", ".join(known)}.')
    config = ConfigDict(base)
    for changes in known[name]:
        config.update(changes)
    return config


def missing(settings: Mapping[str, Any] | ConfigDict, required: Mapping[str, str]) -> list[str]:
    """Return the required settings that are empty.

    Args:
      required: name, with dots between a section and its setting -> an example value.
    """
    return [
        name for name in required if not functools.reduce(operator.getitem, name.split('.'), typing.cast(Any, settings))
    ]


def require(settings: Mapping[str, Any] | ConfigDict, required: Mapping[str, str]) -> None:
    """Raise InputError if a required setting is empty; arguments as of `missing`."""
    for name in missing(settings, required):
        raise InputError(f'config.{name} is empty; pass --config.{name}={required[name]}.')
