"""Base of the component configs: conversion from and to `config.json`, with every value checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from neodragon_jax.base.errors import InputError, did_you_mean


def require(config: Any, **allowed: Any) -> None:
    """Raise InputError if a field that selects an architecture has a value this code does not implement."""
    for name, values in allowed.items():
        value = getattr(config, name)
        if value not in values:
            raise InputError(
                f'{type(config).__name__}.{name} is {value!r}; supported: {", ".join(map(repr, values))}. '
                'The checkpoint needs another architecture than the released one.'
            )


Config = TypeVar('Config', bound='ComponentConfig')


@dataclasses.dataclass(frozen=True)
class ComponentConfig:
    """Base of all component configs: conversion from and to `config.json`."""

    # Written to `config.json` besides the fields, because the reference implementation reads them.
    constant_keys: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    # Diffusers writes constructor arguments only, so an unknown key is a mistake. Transformers adds dozens of generic
    # ones, so there only a near miss of a known key is.
    strict_keys: ClassVar[bool] = True

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
                raise InputError(f'{source}: unknown key "{key}".{hint} Correct or remove it.')
        missing = [
            name
            for name, field in fields.items()
            if name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise InputError(f'{source}: missing key "{missing[0]}". Add it, or copy the file from the release again.')
        freeze = lambda value: tuple(value) if isinstance(value, list) else value
        try:
            return cls(**{name: freeze(values[name]) for name in fields if name in values})
        except InputError as error:
            raise InputError(f'{source}: {error}') from None

    def to_json(self) -> dict[str, Any]:
        """Return the content of `config.json`, without metadata keys."""
        thaw = lambda value: list(value) if isinstance(value, tuple) else value
        return {
            **self.constant_keys,
            **{field.name: thaw(getattr(self, field.name)) for field in dataclasses.fields(self)},
        }
