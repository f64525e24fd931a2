"""Captions of video files: from a table (csv, tsv, jsonl) or from a text file beside each video.

An unusable caption is recorded with a reason instead of raising: among a million captions, some are damaged.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import naming
from neodragon_jax.base.json_file import parse_json
from neodragon_jax.base.table import read_rows
from neodragon_jax.base.text import BadText, clean, decode

# Column names in any case, best first.
FILE_KEYS = ('file', 'file_name', 'filename', 'path', 'file_path', 'video', 'video_path', 'image')
CAPTION_KEYS = ('caption', 'text', 'prompt', 'description')
JSON_LINES = ('.jsonl', '.ndjson')
TABLES = ('.csv', '.tsv', *JSON_LINES)


@dataclasses.dataclass
class Captions:
    """The captions of a table or of text files.

    Attributes:
      by_file: `file_key` of the file -> cleaned caption.
      problems: file, or line of the table, -> why its caption cannot be used.
      repeated: files with several captions, of which the first counts.
    """

    by_file: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: dict[str, str] = dataclasses.field(default_factory=dict)
    repeated: list[str] = dataclasses.field(default_factory=list)

    def add(self, file: str, text: Any) -> None:
        """Add one caption, or record why it cannot be used."""
        key = file_key(file)
        try:
            caption = clean(text)
        except BadText as problem:
            self.problems[key] = str(problem)
            return
        if self.by_file.setdefault(key, caption) != caption:
            self.repeated.append(key)

    def of(self, name: str) -> str | None:
        """Return the caption of a file, which the table may name without its suffix; None if there is none."""
        return _find(self.by_file, name)

    def problem_of(self, name: str) -> str:
        """Return why a file has no caption."""
        return _find(self.problems, name) or 'no caption'


def _find(table: Mapping[str, str], name: str) -> str | None:
    key = file_key(name)
    return table.get(key, table.get(os.path.splitext(key)[0]))


def file_key(name: str) -> str:
    """Return the lookup key of a relative path: in NFC, because some systems store é as two characters."""
    return posixpath.normpath(unicodedata.normalize('NFC', readable(name).replace('\\', '/')))


def readable(name: str) -> str:
    """Return a file name as valid Unicode, whatever bytes it has on disk."""
    return os.fsencode(name).decode('utf-8', 'backslashreplace')


def read_table(path: str | os.PathLike[str], folder: pathlib.Path, option: str = '--captions') -> Captions:
    """Return the captions of a .csv or .tsv file with a header, or of a .jsonl or .ndjson file with an object per line.

    An unusable row is recorded in `Captions.problems`. An unclosed quotation mark is an error, because the rows after
    it cannot be separated. Blanks around a file's name are not part of it.

    Args:
      folder: base of the relative file names in the table; absolute names are accepted as well.
      option: the option that named the table, for messages.
    Raises:
      InputError: the table cannot be read, or does not say which columns are the file and the caption.
    """
    path, named = pathlib.Path(path), f'{option} {path}'
    suffix = path.suffix.lower()
    if suffix not in TABLES:
        raise InputError(f'{named}: give a .csv or .jsonl file, or nothing to read NAME.txt beside NAME.mp4.')
    if not path.is_file():
        raise InputError(f'{named}: no such file. Give a .csv or .jsonl file with files and captions.')
    text = decode(path.read_bytes(), named)
    captions = Captions()
    rows = _jsonl_rows(text) if suffix in JSON_LINES else _table_rows(text, path, named)
    for line, row in rows:
        file, caption = (_pick(row, keys) for keys in (FILE_KEYS, CAPTION_KEYS))
        file = file.strip() if isinstance(file, str) else ''
        if not file or '\0' in file:
            captions.problems[f'{path.name}:{line}'] = row.get(FIELDS) or 'line has no file or no caption'
        elif isinstance(row.get(FIELDS), str):
            captions.problems[file_key(_relative(file, folder))] = f'{path.name}, line {line}: {row[FIELDS]}'
        elif caption is None:
            captions.problems[f'{path.name}:{line}'] = 'line has no file or no caption'
        else:
            captions.add(_relative(file, folder), caption)
    return captions


def read_sidecars(folder: pathlib.Path, names: Iterable[str]) -> Captions:
    """Return the captions in NAME.txt or NAME.mp4.txt beside each file NAME.mp4; files without one are left out.

    Raises:
      OSError: the system cannot read one, which may be good.
    """
    captions = Captions()
    for name in names:
        path = next((folder / sidecar for sidecar in sidecars(name) if (folder / sidecar).is_file()), None)
        if path is not None:
            with naming(path):
                content = path.read_bytes()
            captions.add(name, content.decode('utf-8-sig', 'surrogateescape'))
    return captions


def sidecars(name: str) -> tuple[str, str]:
    """Return the names that a file's caption file may have."""
    return f'{os.path.splitext(name)[0]}.txt', f'{name}.txt'


# Key of a row that cannot be read, or whose number of fields differs from the header's; its value is the message. No
# column has this name, because names are stripped. One without a name is ordinary: the index of a data frame.
FIELDS = '\n'


def _table_rows(text: str, path: pathlib.Path, named: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the first line and the fields of each row of a table, by column name in lower case."""
    rows = read_rows(text, '\t' if path.suffix.lower() == '.tsv' else ',', named)
    names = _header(next(rows, (1, []))[1], path, named)
    for line, fields in rows:
        row = dict(zip(names, fields, strict=False))
        if len(fields) != len(names):
            row[FIELDS] = f'{len(fields)} fields, its header has {len(names)}; put quotation marks around the caption'
        yield line, row


def _header(columns: list[str], path: pathlib.Path, named: str) -> list[str]:
    """Return the column names in lower case, or raise InputError if the file or the caption is not among them."""
    names = [column.strip().lower() for column in columns]
    if not all(any(key in names for key in keys) for keys in (FILE_KEYS, CAPTION_KEYS)):
        raise InputError(
            f'{named}: its first line names the columns {_printable(", ".join(columns))}; name one of '
            f'them {FILE_KEYS[0]} and one {CAPTION_KEYS[0]}, separated by '
            f'{"tabs" if path.suffix.lower() == ".tsv" else "commas"}.'
        )
    if twice := _twice(names):
        raise InputError(f'{named}: its first line names the column {twice} twice; rename one of them.')
    return names


def _twice(names: Iterable[str]) -> str | None:
    """Return a name of the file or the caption that appears more than once."""
    counts = collections.Counter(names)
    return next((name for name in (*FILE_KEYS, *CAPTION_KEYS) if counts[name] > 1), None)


def _jsonl_rows(text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the line and the values of each object, by key in lower case."""
    for number, line in enumerate(text.split('\n'), 1):
        if line.strip():
            yield number, _object(line, f'line {number}')


def _object(line: str, where: str) -> dict[str, Any]:
    """Return the values of a line of JSON by key in lower case, or the problem of the line."""
    try:
        given = parse_json(line, dict[str, Any], where)
    except InputError as error:
        return {FIELDS: str(error)}
    names = [key.strip().lower() for key in given]
    if twice := _twice(names):
        return {FIELDS: f'{where}: has the key {twice} twice, in different spellings'}
    return dict(zip(names, given.values(), strict=True))


def _printable(text: str) -> str:
    """Return the beginning of a text without characters that end a line or change the display."""
    return ''.join(character if character.isprintable() else ' ' for character in readable(text[:200]))


def _pick(row: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """Return the value of the first of some keys that a row has."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _relative(file: str, folder: pathlib.Path) -> str:
    """Return an absolute path inside the folder (links resolved) relative to it, and any other path unchanged."""
    path = pathlib.Path(file)
    if not path.is_absolute():
        return file
    for root in (folder.absolute(), folder.resolve()):
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    # The folder may be reached through another link than the file.
    path = path.parent.resolve() / path.name
    return str(path.relative_to(folder.resolve())) if path.is_relative_to(folder.resolve()) else file
