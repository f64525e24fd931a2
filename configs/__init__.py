"""Settings of the programs: one file each; how they are read from the command line and become frozen dataclasses."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from neodragon_jax.errors import InputError, did_you_mean

T = TypeVar('T')


def freeze(cls: type[T], values: Mapping[str, Any], where: str = 'config') -> T:
    """Return a frozen dataclass with the given values; fields that are dataclasses are made from nested mappings.

    Args:
      where: path of `values` in the settings, for error messages.
    Raises:
      InputError: a key is unknown or missing, or the dataclass refuses a value.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    for key in values:
        if key not in fields:
            raise InputError(f'{where}.{key}: no such setting.{did_you_mean(key, fields)} Correct or remove it.')
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f'{where}.{name} is missing; set it.')
    types = typing.get_type_hints(cls)
    return cls(**{name: _converted(types[name], value, f'{where}.{name}') for name, value in values.items()})


def _converted(kind: Any, value: Any, where: str) -> Any:
    """Return a value as its field stores it."""
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return freeze(typing.cast(type, kind), value, where)
    return tuple(value) if isinstance(value, list) else value


def command_line(main: Callable[[ConfigDict, bool], None], default: str) -> None:
    """Run a program on the settings of the command line.

    `--config=configs/NAME.py:PRESET`, then any `--config.KEY=VALUE`, and `--dry-run`. Whatever is wrong with them ends
    the process with one line and status 2.

    Args:
      main: the program: (settings, whether it is a dry run).
      default: its settings file.
    """
    settings = config_flags.DEFINE_config_file('config', default, 'settings file, and :preset')
    dry_run = flags.DEFINE_bool('dry-run', False, 'print mesh, shapes and bytes per device, then stop')

    def parse(argv: Sequence[str]) -> list[str]:
        # The libraries below tell every file they write.
        logging.set_verbosity(logging.WARNING)
        try:
            return flags.FLAGS(list(argv))
        except (flags.Error, AttributeError, OSError, InputError) as error:
            _refuse(f'settings: {_last_line(error)}')

    def run(argv: Sequence[str]) -> None:
        try:
            if len(argv) > 1:
                raise InputError(f'{argv[1]}: no such argument; settings are --config.KEY=VALUE.')
            main(settings.value, dry_run.value)
        except InputError as error:
            _refuse(str(error))

    app.run(run, flags_parser=parse)


def _last_line(error: BaseException) -> str:
    """Return the end of a message, where what these libraries wrap in several exceptions says what is wrong."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    line = str(error.args[-1]).strip().splitlines()[-1].strip()
    return line.rpartition('InputError: ')[2]


def _refuse(reason: str) -> NoReturn:
    print(f'error: {reason}', file=sys.stderr)
    sys.exit(2)
