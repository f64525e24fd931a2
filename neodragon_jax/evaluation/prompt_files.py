"""Reader of prompt files, shared by all programs.

| suffix | content |
|---|---|
| .json | a list of texts, or of objects with a prompt, such as VBench's `VBench_full_info.json` |
| .jsonl, .ndjson | a text or an object with a prompt on each line |
| .csv, .tsv | a table with a header; one column holds the prompts |
| those of NO_LINES | refused: their lines are not prompts |
| any other | text, one prompt per line |

The prompt of an object or a table is under one of the names COLUMNS. Lines end in LF, CRLF or CR; other separators,
such as U+2028 or a form feed, are spaces within a prompt. Texts are UTF-8, with or without a byte order mark, and are
cleaned by `base.text.clean`.
"""

from __future__ import annotations

import collections
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import parse_json
from neodragon_jax.base.paths import input_path
from neodragon_jax.base.table import read_rows
from neodragon_jax.base.text import BadText, clean, decode

COLUMNS = ('prompt', 'prompt_en', 'caption', 'text')
NO_LINES = (
    *('.yaml', '.yml', '.toml', '.xml', '.html', '.htm', '.ini', '.rtf', '.pdf', '.doc', '.docx', '.odt'),
    *('.xls', '.xlsx', '.ods', '.parquet', '.arrow', '.feather', '.npy', '.npz', '.pkl', '.zip', '.gz', '.zst'),
)


def read_prompts(
    path: str | os.PathLike[str], option: str = '--prompts-file', left_out: collections.Counter[str] | None = None
) -> list[str]:
    """Return the prompts of a file, in order and without repetitions.

    Args:
      path: a file in a format of the module's table.
      option: the option that named the file, for error messages.
      left_out: None raises for a line that cannot be read and skips empty ones; a counter skips both, and counts them
        and the repetitions by reason.
    Raises:
      InputError: the file does not exist, is damaged, or has no prompt.
    """
    path = input_path(path, option)
    name = f'{option} {path}'
    if not path.is_file():
        raise InputError(f'{name}: no such file. Give a text file with one prompt per line.')
    if path.suffix.lower() in NO_LINES:
        raise InputError(f'{name}: {path.suffix} is not read. Save it as text with one prompt per line, CSV or JSON.')
    prompts: dict[str, None] = {}
    counts = collections.Counter[str]() if left_out is None else left_out
    for line, value in _values(name, path.suffix.lower(), _read_text(name, path)):
        try:
            prompt = clean(value, 'line')
        except BadText as problem:
            if left_out is None and not (isinstance(value, str) and not value.strip('\ufeff').strip()):
                raise InputError(f'{name}, line {line}: {problem}. Correct it, or save the file as UTF-8.') from None
            counts[str(problem)] += 1
            continue
        counts['repeated'] += prompt in prompts
        prompts[prompt] = None
    if left_out is not None:
        left_out += collections.Counter()  # drops zeros
    if not prompts:
        raise InputError(f'{name}: empty: no prompt in it. Write one per line, in UTF-8.')
    return list(prompts)


def _read_text(name: str, path: pathlib.Path) -> str:
    """Return a file's text with LF line ends."""
    # Neither splitlines nor text mode: both also end a line at rare characters that occur within prompts.
    return decode(path.read_bytes(), name).replace('\r\n', '\n').replace('\r', '\n')


def _values(name: str, suffix: str, text: str) -> Iterator[tuple[int, Any]]:
    """Yield the line number and the uncleaned prompt of every entry of a file."""
    if suffix == '.json':
        rows = parse_json(text, object, name)
        if not isinstance(rows, list):
            raise InputError(f'{name}: not a list of prompts; write ["a cat", ...] or [{{"prompt": "a cat"}}, ...].')
        yield from ((row, _prompt_of(f'{name}, entry {row}', value)) for row, value in enumerate(rows, 1))
    elif suffix in ('.jsonl', '.ndjson'):
        for line, entry in enumerate(text.split('\n'), 1):
            if entry.strip():
                yield line, _prompt_of(f'{name}, line {line}', parse_json(entry, object, f'{name}, line {line}'))
    elif suffix in ('.csv', '.tsv'):
        yield from _table_rows(name, text, '\t' if suffix == '.tsv' else ',')
    else:
        yield from enumerate(text.removesuffix('\n').split('\n'), 1)


def _prompt_of(where: str, value: Any) -> str:
    """Return the prompt of a JSON entry."""
    if isinstance(value, dict):
        value = value[_column(where, list(value))]
    if not isinstance(value, str):
        raise InputError(f'{where}: not a text. Write "a cat" or {{"prompt": "a cat"}}.')
    return value


def _column(where: str, names: list[str]) -> str:
    """Return the one name that holds the prompt."""
    found = [name for name in names if name.strip().lower() in COLUMNS]
    if len(found) != 1:
        # Names of a damaged file may have any characters.
        listed = ''.join(letter if letter.isprintable() else ' ' for letter in ', '.join(names)[:200]) or 'none'
        raise InputError(
            f'{where}: {len(found)} columns with prompts among {listed}; name one of them '
            f'"{COLUMNS[0]}" and no other {" or ".join(COLUMNS[1:])}.'
        )
    return found[0]


def _table_rows(name: str, text: str, separator: str) -> Iterator[tuple[int, str]]:
    """Yield the prompts of a table, each with the line on which its row begins."""
    rows = read_rows(text, separator, name)
    _, header = next(rows, (1, []))
    column = header.index(_column(f'{name}, line 1', header))
    for line, row in rows:
        if len(row) != len(header):
            raise InputError(
                f'{name}, line {line}: {len(row)} fields, the header has {len(header)}. Put quotation marks around a '
                'prompt that contains the separator.'
            )
        yield line, row[column]
