"""Write the reference of all settings from the training programs' dataclasses and settings files.

python docs/make_settings.py docs/reference/settings.md

Meanings come from the `Attributes` of the dataclasses, defaults from the first preset of each file in configs/.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import pathlib
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from train.runtime.optimizer import OptimizerConfig
from train.runtime.program import LoopConfig
from train.runtime.runner import recipe_of
from train.runtime.settings import defaults

PROGRAMS = ('teacher', 'dmd', 'text', 'pruning', 'autoencoder', 'decoder', 'super_resolution')
# Sections of most programs -> heading of their table.
SHARED: dict[type, str] = {LoopConfig: 'The section loop', OptimizerConfig: 'Sections of an optimizer'}
# Settings of a shared section that have no default.
REQUIRED = {'steps', 'batch_size'}

_HEAD = """\
# Settings of the training programs

This page is made from the code: `python docs/make_settings.py docs/reference/settings.md`. Give a setting as
`--config.PATH=VALUE`, and a tuple in quotes: `--config.dmd.student_steps="(2, 2, 1)"`. Defaults are those of
`--config=configs/NAME.py` without a preset, which has the published sizes. The docstring of that file explains the
other presets.

`loop` and the optimizers have one table each, [at the end](#the-section-loop). A program's row names the values in
which it differs. Steps are those of the training loop; times are seconds; sizes of pictures are pixels.
"""


class Section(typing.NamedTuple):
    """A section of a program's settings: its path, its dataclass, and its values in the settings file."""

    path: str
    kind: type
    values: Mapping[str, Any]


def meanings(kind: type) -> dict[str, str]:
    """Return the meaning of each attribute in the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        text = inspect.cleandoc(base.__dict__.get('__doc__') or '')
        block = re.search(r'(?ms)^Attributes:\n(.*?)(?=^\S|\Z)', text)
        items = re.findall(r'(?m)^  (\w[\w, ]*): (.*(?:\n {4}.*)*)', block[1] if block else '')
        for names, meaning in items:
            together = f'{", ".join(f"`{name}`" for name in names.split(", "))}: ' if ',' in names else ''
            found |= dict.fromkeys(names.split(', '), together + ' '.join(meaning.split()))
    return found


def summary(kind: type) -> str:
    """Return the first sentence of a class's docstring."""
    return ' '.join(inspect.cleandoc(kind.__doc__ or '').partition('\n\n')[0].split())


def ordered(section: Section) -> list[str]:
    """Return the names of a section's settings in the order of its dataclass; a ConfigDict sorts them."""
    return [field.name for field in dataclasses.fields(section.kind) if field.name in section.values]


def subsections(section: Section) -> Iterator[Section]:
    """Yield the sections directly inside a section."""
    hints = typing.get_type_hints(section.kind)
    for name in ordered(section):
        if dataclasses.is_dataclass(hints[name]):
            kind = typing.cast(type, hints[name])
            yield Section(f'{section.path}.{name}'.lstrip('.'), kind, section.values[name])


def sections(section: Section) -> Iterator[Section]:
    """Yield a section and all sections inside it, in the order of the settings file."""
    yield section
    for inside in subsections(section):
        yield from sections(inside)


def programs() -> dict[str, Section]:
    """Return the whole settings of every program, as its first preset has them."""
    configs = {name: importlib.import_module(f'configs.{name}').get_config().to_dict() for name in PROGRAMS}
    return {name: Section('', recipe_of(name).settings, values) for name, values in configs.items()}


def differences(values: Mapping[str, Any], usual: Mapping[str, Any], prefix: str = '') -> list[str]:
    """Return the values that differ from the defaults, as 'name value'."""
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += differences(value, usual[name], f'{prefix}{name}.')
        elif shown(value) != shown(usual[name]):
            found.append(f'`{prefix}{name}` {shown(value)}')
    return found


def shown(value: Any) -> str:
    """Return a value as it is given on the command line."""
    if isinstance(value, (tuple, list)):
        return f'`{tuple(value)}`'
    return '`' + (value if isinstance(value, str) and value else repr(value)) + '`'


def anchor(title: str) -> str:
    """Return the anchor of a heading."""
    return re.sub(r'[\s-]+', '-', re.sub(r'[^\w\s-]', '', title).strip().lower())


def cell(text: str) -> str:
    """Return a text as the cell of a table."""
    return text.replace('|', r'\|')


def rows(section: Section) -> Iterator[str]:
    """Yield the rows of a section and, where they are not shared, of those inside it."""
    told, hints = meanings(section.kind), typing.get_type_hints(section.kind)
    inside = {part.path.rpartition('.')[2]: part for part in subsections(section)}
    for name in ordered(section):
        path, value = f'{section.path}.{name}'.lstrip('.'), section.values[name]
        if name not in inside:
            yield f'| `{path}` | {cell(shown(value))} | {cell(told[name])} |'
        elif hints[name] in SHARED:
            changed = ', '.join(differences(value, usual_values(hints[name])))
            link = f'[{path.rpartition(".")[2]}](#{anchor(SHARED[hints[name]])})'
            yield f'| `{path}` | {link} | {"with " + cell(changed) if changed else "all defaults"} |'
        else:
            yield from rows(inside[name])


def table(lines: Iterator[str]) -> str:
    """Return a table of settings."""
    return '\n'.join(['| setting | default | meaning |', '|---|---|---|', *lines, ''])


def undescribed(section: Section) -> list[str]:
    """Return the settings of a section and of those inside it that no docstring describes."""
    missing = []
    for part in sections(section):
        inside = {each.path.rpartition('.')[2] for each in subsections(part)}
        missing += [f'{part.path}.{name}' for name in part.values if name not in inside | meanings(part.kind).keys()]
    return missing


def usual_values(kind: type) -> dict[str, Any]:
    """Return the defaults of a shared section."""
    required = {field.name for field in dataclasses.fields(kind) if field.name in REQUIRED}
    return defaults(kind, **dict.fromkeys(required, 'required'))


def page() -> str:
    """Return the page."""
    parts = [_HEAD]
    for name, root in programs().items():
        parts += [f'## train.{name}\n', table(rows(root))]
    for kind, title in SHARED.items():
        parts += [f'## {title}\n', f'{summary(kind)}\n', table(rows(Section('', kind, usual_values(kind))))]
    return '\n'.join(parts)


def main() -> None:
    """Write the page that the command line names."""
    parser = argparse.ArgumentParser('docs/make_settings.py', description='Write the reference of all settings.')
    parser.add_argument('page', type=pathlib.Path, help='Markdown file')
    parser.parse_args().page.write_text(page())


if __name__ == '__main__':
    main()
