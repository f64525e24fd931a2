"""Rows of tables in CSV or TSV, for all readers of them: an open quotation mark swallows no rows in silence.

A quoted field with line breaks may be right, or it may be rows behind a quotation mark that nobody closed. It is taken
for rows if one of its lines has the separators of a row. Commas of prose do not count: a blank or the line's end
follows them, or three digits if they are between digits.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence

from neodragon_jax.base.errors import InputError

# A line that begins with a file's name and a separator, whatever follows.
_FILE_ROW = re.compile(r'[^,"\t]+\.\w{2,4}"?[,\t]')
# Separators of rows, and not of prose.
_TIGHT = {',': re.compile(r',(?=\S)(?!(?<=\d,)\d{3}(?!\d))'), '\t': re.compile(r'\t')}


def read_rows(text: str, separator: str, named: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the line on which each row begins, and its fields; the first row is the header.

    Blanks after a separator and empty rows are skipped. The number of fields may differ from the header's.

    Args:
      text: lines that end in LF, CRLF or CR.
      separator: ',' or a tab.
      named: the file, for messages.
    Raises:
      InputError: a quotation mark is not closed or not doubled.
    """
    lines = text.replace('\r\n', '\n').replace('\r', '\n').split('\n')
    reader = csv.reader((f'{line}\n' for line in lines), delimiter=separator, skipinitialspace=True, strict=True)
    start, header, columns = 0, '', 0
    while True:
        try:
            fields = next(reader, None)
            if fields is None:
                return
            raw = lines[start : reader.line_num]
            header, columns = (header, columns) if columns else (raw[0], len(fields))
            if any('\n' in field for field in fields) and _holds_rows(
                fields, columns, _pattern(separator, header, raw)
            ):
                raise csv.Error('a field holds other rows')
        except csv.Error as error:
            raise InputError(
                f'{named}: the row of line {start + 1} has a quotation mark that is not closed or not doubled '
                f'({error}); correct that line, or write its field on one line.'
            ) from None
        if fields:
            yield start + 1, fields
        start = reader.line_num


def _pattern(separator: str, header: str, raw: Sequence[str]) -> re.Pattern[str]:
    """Return the pattern of a row's separators; a table or a row with blanks after them has those of prose."""
    tight, blank = _TIGHT[separator], re.compile(rf'{separator} +"(?!")')
    blanks_in_header = separator in header and not tight.search(header)
    return re.compile(separator) if blanks_in_header or blank.search('\n'.join(raw)) else tight


def _holds_rows(fields: Sequence[str], columns: int, separators: re.Pattern[str]) -> bool:
    """Return whether a line of a field has the separators of a row, or of the row's part on its side of the field."""
    count = lambda line: len(separators.findall(line))
    for column, field in enumerate(fields):
        first, *inner = field.split('\n')
        behind = columns - 1 - column
        if not inner:
            continue
        if 0 < behind <= count(first) or 0 < column <= count(inner[-1]):
            return True
        if any(0 < columns - 1 <= count(line) or _FILE_ROW.match(line) for line in inner):
            return True
    return False
