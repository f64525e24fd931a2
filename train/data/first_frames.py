"""First frames of prompts: pictures that are paired with prompts by number or by a table, never by sort order."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence

from neodragon_jax.base.errors import InputError, did_you_mean
from train.data.captions import TABLES, read_table
from train.data.video_files import PICTURES

SHOWN = 4  # pairs that are printed

_NUMBER = re.compile(r'\d+')


def pair_pictures(
    given: pathlib.Path, prompts: Sequence[str], option: str, words: Sequence[str] = ()
) -> list[pathlib.Path]:
    """Return the picture of each prompt, in the order of the prompts.

    Args:
      given: a folder of numbered pictures, 1 to N or 0 to N - 1 (the last number of a name counts), or a table with the
        columns file and caption, whose captions are the prompts.
      option: the option that named it, for error messages.
      words: other values of the option.
    Raises:
      InputError: there is no such folder or table, or a prompt has no picture or several.
    """
    if given.suffix.lower() in TABLES:
        return _by_table(given, prompts, option)
    if not given.is_dir():
        also = ''.join(f'{word}, ' for word in words)
        raise InputError(
            f'{option} {given}: no such folder.{did_you_mean(str(given), words)} Give {also}a folder of numbered '
            'pictures, or a table.'
        )
    return _by_number(given, len(prompts), option)


def _by_number(folder: pathlib.Path, count: int, option: str) -> list[pathlib.Path]:
    """Return the pictures of a folder by their numbers."""
    found: dict[int, pathlib.Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICTURES and not path.name.startswith('.'):
            numbers = _NUMBER.findall(path.stem)
            if not numbers:
                raise InputError(
                    f'{option} {path}: no number in its name. Number the pictures like the prompts, from 1 to {count}, '
                    'or give a table with the columns file and caption.'
                )
            number = int(numbers[-1])
            if number in found:
                raise InputError(
                    f'{option} {folder}: {found[number].name} and {path.name} have the same number; rename one.'
                )
            found[number] = path
    first = min(found, default=1)
    if first > 1 or sorted(found) != list(range(first, first + count)):
        raise InputError(
            f'{option} {folder}: {len(found)} pictures for {count} prompts; number them from 1 to {count}, one per '
            'prompt, without gaps.'
        )
    return [found[number] for number in sorted(found)]


def _by_table(table: pathlib.Path, prompts: Sequence[str], option: str) -> list[pathlib.Path]:
    """Return the pictures that a table names for the prompts."""
    captions = read_table(table, table.parent, option)
    if captions.problems:
        place, problem = next(iter(captions.problems.items()))
        raise InputError(f'{option} {table}: {place}: {problem}; correct it.')
    found: dict[str, str] = {}
    for file, prompt in captions.by_file.items():
        if prompt in found:
            raise InputError(f'{option} {table}: {found[prompt]} and {file} have one caption; keep one of them.')
        found[prompt] = file
    paths = []
    for prompt in prompts:
        if prompt not in found:
            raise InputError(f'{option} {table}: no picture for the prompt "{prompt[:60]}"; add a row.')
        path = table.parent / found[prompt]
        if not path.is_file():
            raise InputError(f'{option} {table}: {path} does not exist; correct the row of "{prompt[:60]}".')
        paths.append(path)
    return paths


def describe_pairs(pictures: Sequence[pathlib.Path], prompts: Sequence[str]) -> str:
    """Return lines that show the first pairs and the last one."""
    places = [*range(min(SHOWN, len(prompts)) - 1), len(prompts) - 1]
    lines = [f'  {os.fspath(pictures[place].name)}  {prompts[place][:80]}' for place in places]
    if len(prompts) > SHOWN:
        lines.insert(-1, f'  ... {len(prompts) - SHOWN} more')
    return '\n'.join(['first frames and prompts:', *lines])
