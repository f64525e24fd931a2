"""Settings of the programs: one file each; how they are read from the command line and become frozen dataclasses."""

from __future__ import annotations

import dataclasses
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from neodragon_jax.base.errors import InputError, did_you_mean
from train.runtime.program import DivergedError
from train.runtime.sharding import leave

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


def defaults(cls: type, *left_out: str, **changes: Any) -> dict[str, Any]:
    """Return every setting of a frozen dataclass, so that a settings file shows them all and each can be overridden.

        'loop': defaults(LoopConfig, 'workdir', 'seed', 'updates', steps=5000, batch_size=8)

    Args:
      left_out: fields that the program fills in.
      changes: other values than the defaults; required where there is no default, nested mappings for dataclasses.
    Raises:
      InputError: a change is no field of the dataclass.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in left_out}
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


def command_line(main: Callable[[ConfigDict, bool], None], default: str) -> None:
    """Run a program on the settings of the command line.

    `--config=configs/NAME.py:PRESET`, then any `--config.KEY=VALUE`, and `--dry-run`. Whatever is wrong with them ends
    the process with one line and status 2, a run that diverges with one line and status 1. Any other error of one
    process of several ends it at once, with status 1.

    Args:
      main: the program: (settings, whether it is a dry run).
      default: its settings file.
    """
    settings = config_flags.DEFINE_config_file('config', default, 'settings file, and :preset')
    dry_run = flags.DEFINE_bool('dry-run', False, 'print mesh, shapes, bytes and arithmetic, then stop')

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
        except DivergedError as error:
            _refuse(str(error), status=1)
        except Exception:
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            leave(1)

    app.run(run, flags_parser=parse)


def _last_line(error: BaseException) -> str:
    """Return the end of a message, where what these libraries wrap in several exceptions says what is wrong."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    line = str(error.args[-1]).strip().splitlines()[-1].strip()
    return line.rpartition('InputError: ')[2]


def _refuse(reason: str, status: int = 2) -> NoReturn:
    print(f'error: {reason}', file=sys.stderr)
    leave(status)
