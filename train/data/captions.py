"""Captions of video files: from a table (csv, tsv, jsonl) or from a text file beside each video.

An unusable caption is recorded with a reason instead of raising: among a million captions, some are damaged.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import pathlib
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import parse_json
from neodragon_jax.base.text import BadText, clean

# Column names in any case, best first.
FILE_KEYS = ('file', 'file_name', 'filename', 'path', 'file_path', 'video', 'video_path', 'image')
CAPTION_KEYS = ('caption', 'text', 'prompt', 'description')
# A line like this inside a quoted caption is another row, swallowed because of an unclosed quotation mark.
SWALLOWED_ROW = re.compile(r'^[^,"\n]+\.\w{2,4}"?[,\t]', re.MULTILINE)


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
    """Return the captions of a .csv or .tsv file with a header, or of a .jsonl file with one object per line.

    An unusable row is recorded in `Captions.problems`. An unclosed quotation mark is an error, because the rows after
    it cannot be separated.

    Args:
      folder: base of the relative file names in the table; absolute names are accepted as well.
      option: the option that named the table, for messages.
    Raises:
      InputError: the table cannot be read, or does not say which columns are the file and the caption.
    """
    path, named = pathlib.Path(path), f'{option} {path}'
    readers = {'.csv': _table_rows, '.tsv': _table_rows, '.jsonl': _jsonl_rows}
    if path.suffix.lower() not in readers:
        raise InputError(f'{named}: give a .csv or .jsonl file, or nothing to read NAME.txt beside NAME.mp4.')
    if not path.is_file():
        raise InputError(f'{named}: no such file. Give a .csv or .jsonl file with files and captions.')
    content = path.read_bytes()
    if content.startswith((b'\xff\xfe', b'\xfe\xff')):
        raise InputError(f'{named}: UTF-16 text. Save it as UTF-8.')
    # Bytes that are not UTF-8 become surrogates, which `clean` detects, so that only the affected line is rejected.
    text = content.decode('utf-8-sig', 'surrogateescape')
    captions = Captions()
    for line, row in readers[path.suffix.lower()](text, path, named):
        file, caption = (_pick(row, keys) for keys in (FILE_KEYS, CAPTION_KEYS))
        if not isinstance(file, str) or not file or '\0' in file:
            captions.problems[f'{path.name}:{line}'] = row.get(FIELDS) or 'line has no file or no caption'
        elif isinstance(row.get(FIELDS), str):
            captions.problems[file_key(_relative(file, folder))] = f'{path.name}, line {line}: {row[FIELDS]}'
        elif caption is None:
            captions.problems[f'{path.name}:{line}'] = 'line has no file or no caption'
        else:
            captions.add(_relative(file, folder), caption)
    return captions


def read_sidecars(folder: pathlib.Path, names: Iterable[str]) -> Captions:
    """Return the captions in NAME.txt or NAME.mp4.txt beside each file NAME.mp4; files without one are left out."""
    captions = Captions()
    for name in names:
        path = next((folder / sidecar for sidecar in sidecars(name) if (folder / sidecar).is_file()), None)
        if path is not None:
            try:
                captions.add(name, path.read_bytes().decode('utf-8-sig', 'surrogateescape'))
            except OSError as error:
                captions.problems[file_key(name)] = f'caption cannot be read ({error.strerror})'
    return captions


def sidecars(name: str) -> tuple[str, str]:
    """Return the names that a file's caption file may have."""
    return f'{os.path.splitext(name)[0]}.txt', f'{name}.txt'


# Key of a row that cannot be read, or whose number of fields differs from the header's; its value is the message.
FIELDS = ''


def _table_rows(text: str, path: pathlib.Path, named: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the first line and the fields of each row of a table, by column name in lower case."""
    delimiter = '\t' if path.suffix.lower() == '.tsv' else ','
    reader = csv.reader(io.StringIO(text, newline=''), delimiter=delimiter, skipinitialspace=True, strict=True)
    line = 1
    try:
        names = _header(next(reader, []), path, named)
        line = reader.line_num + 1
        for fields in reader:
            if any(SWALLOWED_ROW.search(field.partition('\n')[2]) for field in fields):
                raise csv.Error('a caption holds other rows')
            if len(fields) == len(names):
                yield line, dict(zip(names, fields, strict=True))
            elif fields:
                many = f'{len(fields)} fields, its header has {len(names)}; put quotation marks around the caption'
                yield line, dict(zip(names, fields, strict=False)) | {FIELDS: many}
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f'{named}: the row of line {line} has a quotation mark that is not closed or not doubled '
            f'({error}); correct that line.'
        ) from None


def _header(columns: list[str], path: pathlib.Path, named: str) -> list[str]:
    """Return the column names in lower case, or raise InputError if the file or the caption is not among them."""
    names = [column.strip().lower() for column in columns]
    if not all(any(key in names for key in keys) for keys in (FILE_KEYS, CAPTION_KEYS)):
        raise InputError(
            f'{named}: its first line names the columns {_printable(", ".join(columns))}; name one of '
            f'them {FILE_KEYS[0]} and one {CAPTION_KEYS[0]}, separated by '
            f'{"tabs" if path.suffix.lower() == ".tsv" else "commas"}.'
        )
    return names


def _jsonl_rows(text: str, path: pathlib.Path, named: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    del path, named
    for number, line in enumerate(text.split('\n'), 1):
        if line.strip():
            try:
                row = parse_json(line, dict[str, Any], f'line {number}')
            except InputError as error:
                row = {FIELDS: str(error)}
            yield number, {key.lower(): value for key, value in row.items()}


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
