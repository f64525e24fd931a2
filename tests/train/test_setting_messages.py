"""Messages on the settings of all programs: each begins with the setting's place, config.SECTION.NAME."""

from __future__ import annotations

import copy
import functools
import importlib
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from neodragon_jax.base.errors import InputError
from support.goldens import ROOT
from train.runtime.runner import recipe_of
from train.runtime.settings import freeze

PROGRAMS = sorted(path.stem for path in (ROOT / 'configs').glob('[a-z]*.py'))


def leaves(settings: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the place of every setting."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, (*place, name))
        else:
            yield (*place, name)


def wrong(value: Any) -> list[Any]:
    """Return values of the same type, some of which no setting takes."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [type(value)(other) for other in (-1, 0, 3, 1.5, 10**9)]
    if isinstance(value, tuple):
        kind, count = type(value[0]) if value else float, len(value)
        return [(), (kind(-1),) * max(count, 1), (kind(2),) * (count + 1)]
    return ['unknown', '']


def in_settings(place: str, settings: Any) -> bool:
    """Return whether config.SECTION.NAME is a setting or a section."""
    try:
        functools.reduce(operator.getitem, place.split('.')[1:], settings)
    except KeyError:
        return False
    return True


@pytest.mark.parametrize('program', PROGRAMS)
def test_every_message_begins_with_the_place_of_a_setting(program):
    """In all sections, each setting takes wrong values one at a time, which also tests how it fits the others."""
    settings, recipe = importlib.import_module(f'configs.{program}').get_config().to_dict(), recipe_of(program)
    refused = 0
    for *sections, name in leaves(copy.deepcopy(settings)):
        section = functools.reduce(operator.getitem, sections, settings)
        given = section[name]
        for value in wrong(given):
            section[name] = value
            try:
                freeze(recipe.settings, settings)
            except InputError as error:
                # A colon after a section would mean that the message does not begin with the section's setting.
                found = re.match(r'(config(\.\w+)+)[ ,[]', str(error))
                assert found and in_settings(found[1], settings), f'{".".join(sections)}.{name}: {error}'
                refused += 1
        section[name] = given
    assert refused > 20
