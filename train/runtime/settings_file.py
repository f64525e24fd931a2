"""Check of the settings on a command line: the settings file loads, and has every setting that the line changes.

ml_collections reports a file that does not load only when a setting is read, and an unknown name without its place.
"""

from __future__ import annotations

import itertools
import pathlib
import re
import runpy
from collections.abc import Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from neodragon_jax.base.errors import InputError, did_you_mean
from train.runtime.settings import no_such_setting

_FILE = re.compile(r'--?config(=(?P<file>.*))?', re.DOTALL)
_CHANGE = re.compile(r'--?(no)?config\.(?P<name>[^=]*)(=.*)?', re.DOTALL)


def check_command_line(argv: Sequence[str], default: str) -> None:
    """Check `--config=FILE:PRESET` and the names of `--config.KEY=VALUE`; the values are parsed later.

    Args:
      argv: the command line, with the name of the program.
      default: settings file of a command line that names none.
    Raises:
      InputError: the file is missing or does not load, or it has no such preset or setting.
    """
    words = flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)[1:]
    names = [match['name'] for match in map(_CHANGE.fullmatch, words) if match]
    for location in list(_files(words)) or [default]:
        settings = load(location, default)
        for name in names:
            _check_name(settings, name)


def load(location: str, example: str) -> ConfigDict:
    """Return the settings of FILE:PRESET.

    Args:
      example: a settings file, for messages.
    Raises:
      InputError: the file is missing or does not load, or it has no such preset.
    """
    file, colon, preset = location.partition(':')
    path = pathlib.Path(file)
    if not path.is_file():
        near = did_you_mean(path.name, [other.name for other in sorted(path.parent.glob('*.py'))])
        raise InputError(f'--config={file}: no such file.{near} Pass a settings file, such as {example}.')
    try:
        get_config = runpy.run_path(file).get('get_config')
        settings = get_config(*([preset] if colon else [])) if get_config else None
    except InputError:
        raise
    # The file is the user's program, which may raise anything.
    except Exception as error:
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise InputError(f'--config={location}: does not load ({reason}). Correct the file.') from None
    if not isinstance(settings, ConfigDict):
        raise InputError(f'--config={location}: has no function get_config that returns a ConfigDict; add it.')
    return settings


def _files(words: Sequence[str]) -> Iterator[str]:
    """Yield the values of --config=VALUE and of --config VALUE."""
    for word, following in itertools.pairwise([*words, '']):
        match = _FILE.fullmatch(word)
        if match and match[1]:
            yield match['file']
        elif match and following:
            yield following


def _check_name(settings: ConfigDict, name: str) -> None:
    """Raise InputError unless the settings have a name, with dots between a section and its setting."""
    try:
        parts = config_path.split(name)
    except ValueError:
        raise InputError(f'config.{name}: not a name; write names with dots, such as config.loop.steps.') from None
    where, section = 'config', settings
    for part in parts:
        if not isinstance(section, ConfigDict):
            raise InputError(f'{where} is a setting, not a section, and has no {part!r}; change the whole setting.')
        if not isinstance(part, str) or part not in section:
            raise no_such_setting(where, str(part), section.keys())
        where, section = f'{where}.{part}', section[part]
