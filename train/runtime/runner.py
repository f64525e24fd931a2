"""Recipes: construction of a run from its settings, shared by a program's command, --dry-run and `train.aot`.

A program's package train/NAME has a module `program` with a constant `RECIPE`; configs/NAME.py holds its settings.
`train.aot` varies these settings by name: `loop.mesh`, `loop.batch_size`, and `remat` and `attention` in any section.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, NoReturn, Protocol, TypeVar

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from neodragon_jax.base.atomic import check_writable
from neodragon_jax.base.command_line import exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.processes import start_processes
from train.data import Source
from train.runtime import loop
from train.runtime.loader import check_batch_size
from train.runtime.plan import plan
from train.runtime.processes import exit_process
from train.runtime.profiler import note_requests
from train.runtime.program import DivergedError, LoopConfig, Program
from train.runtime.settings import freeze, missing, require
from train.runtime.settings_file import check_command_line
from train.runtime.sharding import make_mesh


class RunSettings(Protocol):
    """The settings of a program: a frozen dataclass with the fields of its settings file."""

    @property
    def data(self) -> str:
        """Return the location of the samples; '' for none."""
        ...

    @property
    def loop(self) -> LoopConfig:
        """Return the section of the training loop."""
        ...


class Training(NamedTuple):
    """A program with its samples and the settings of its run: the arguments of `loop.run` and `plan`."""

    program: Program
    source: Source
    run: LoopConfig


Settings = TypeVar('Settings', bound=RunSettings)


@dataclasses.dataclass(frozen=True)
class Recipe(Generic[Settings]):
    """Recipe of a program: functions that build its training from settings.

    Attributes:
      settings: class of the frozen dataclass of settings.
      load: returns the training, with the weights and the samples that the settings name.
      abstract: returns the training as shapes: frozen parameters are abstract, and the source repeats a blank sample.
        Without a named checkpoint, the sizes are the published ones.
      required: settings of a run that must not be empty, such as 'data' or 'decoder.start', with an example value.
    """

    settings: type[Settings]
    load: Callable[[Settings], Training]
    abstract: Callable[[Settings], Training]
    required: Mapping[str, str]

    def read(self, settings: ConfigDict) -> Settings:
        """Return the settings as a frozen dataclass.

        Raises:
          InputError: a setting is unknown, missing or out of range.
        """
        return freeze(self.settings, settings.to_dict())

    def size(self, settings: ConfigDict) -> Training:
        """Return the training as shapes; no data and no weights are needed."""
        return self.abstract(self.read(settings))

    def run(self, settings: ConfigDict, dry_run: bool = False) -> None:
        """Train with the settings, or print the plan.

        A plan reads data and weights only if the settings name all of them.

        Raises:
          InputError: a setting is wrong, or does not fit the data.
        """
        given = self.read(settings)
        as_shapes = dry_run and bool(set(missing(settings, self.required)) - {'workdir'})
        if not dry_run:
            require(settings, self.required)
        start_processes(given.loop.distributed, given.loop.start_timeout_s)
        # Before `load`, which may copy gigabytes.
        check_batch_size(given.loop.batch_size, make_mesh(given.loop.mesh))
        if not dry_run and jax.process_index() == 0:
            check_writable(given.loop.folder)
        training = self.abstract(given) if as_shapes else self.load(given)
        if dry_run:
            print(plan(*training))
        else:
            loop.run(*training)


def recipe_of(name: str) -> Recipe:
    """Return the recipe of train/NAME/program.py.

    Raises:
      InputError: there is no such program.
    """
    module = f'train.{name}.program'
    try:
        return importlib.import_module(module).RECIPE
    except ModuleNotFoundError as error:
        if not f'{module}.'.startswith(f'{error.name}.'):
            raise
        raise InputError(f'configs/{name}.py belongs to no program: there is no train/{name}/program.py.') from None


def size(name: str, settings: ConfigDict) -> Training:
    """Return the training of a program as shapes; no data, no weights and no memory are needed.

    Raises:
      InputError: there is no such program, or a setting is wrong.
    """
    return recipe_of(name).size(settings)


_CONFIG_HELP = (
    'settings file and preset, FILE:PRESET; --config.KEY=VALUE changes one setting. The docstring of the file has '
    'commands, hardware and expected results, the file has all settings.'
)
_WRONG_SETTINGS = (flags.Error, InputError)


def program_name(config_file: str) -> str:
    """Return NAME of configs/NAME.py:PRESET."""
    return pathlib.Path(config_file.partition(':')[0]).stem


def command_line(main: Callable[[ConfigDict, bool], None], default: str) -> None:
    """Run a program on the settings of the command line.

    `--config=configs/NAME.py:PRESET`, then any `--config.KEY=VALUE`, and `--dry-run`. An input error ends the process
    with one line and status 2, a diverged run with one line and status 1. Any other error of one process of several
    ends it at once, with status 1.

    Args:
      main: function of the settings, and of whether to print the plan only.
      default: the program's settings file.
    """
    try:
        check_command_line(sys.argv, default)
        settings = config_flags.DEFINE_config_file('config', default, _CONFIG_HELP)
    except _WRONG_SETTINGS as error:
        _refuse(f'settings: {_last_line(error)}')
    dry_run = flags.DEFINE_bool('dry-run', False, 'print mesh, shapes, bytes and arithmetic, then stop')
    _list_flags_in_help()

    def parse(argv: Sequence[str]) -> list[str]:
        logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it writes
        try:
            return flags.FLAGS(list(argv))
        except SystemExit:  # after --help, which absl ends with status 1
            sys.exit(0)
        except _WRONG_SETTINGS as error:
            _refuse(f'settings: {_last_line(error)}')

    def run(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            _refuse(f'{argv[1]}: no such argument; settings are --config.KEY=VALUE.')
        note_requests()
        exit_on_errors(lambda: main(settings.value, dry_run.value))

    app.run(run, flags_parser=parse)


def _list_flags_in_help() -> None:
    """List the flags of this package's modules in --help; absl lists only those of the main module."""
    for module, found in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith('train.'):
            for flag in found:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def exit_on_errors(work: Callable[[], object]) -> None:
    """Run the work of a process, and exit with a nonzero status if it fails.

    An input error prints one line, with the status of `base.command_line`; a diverged run exits with status 1. Any
    other error keeps its traceback; one of several processes then exits immediately, so that the others do not wait.
    """
    try:
        status = exit_status(work)
    except DivergedError as error:
        _refuse(str(error), status=1)
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exception(error)
        exit_process(1)
    if status:
        exit_process(status)


def _last_line(error: BaseException) -> str:
    """Return the last line of the innermost message: absl and ml_collections wrap the cause in several exceptions."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    line = str(error.args[-1]).strip().splitlines()[-1].strip()
    return line.rpartition('InputError: ')[2]


def _refuse(reason: str, status: int = 2) -> NoReturn:
    print(f'error: {reason}', file=sys.stderr)
    exit_process(status)
