"""Reading and cleaning of user-written texts: repairs formatting, and rejects damaged texts."""

from __future__ import annotations

import unicodedata
from typing import Any

from neodragon_jax.base.errors import InputError

# 128 T5 tokens are about 500 characters; much longer texts come from an unclosed quotation mark.
MAX_CHARACTERS = 10_000


class BadText(ValueError):
    """Error for a damaged text; the message has the reason."""


def is_unicode(text: str) -> bool:
    """Return whether a text has no surrogates, into which bytes that are not UTF-8 are turned."""
    return not any('\ud800' <= character <= '\udfff' for character in text)


def decode(content: bytes, named: str) -> str:
    """Return the text of a file in UTF-8, without its byte order mark.

    Bytes that are not UTF-8 become surrogates, which `clean` refuses: only the lines with them are affected.

    Args:
      named: the file, for messages.
    Raises:
      InputError: it is UTF-16 or UTF-32, with or without a byte order mark, or no text.
    """
    if content.startswith((b'\xff\xfe', b'\xfe\xff')):
        raise InputError(f'{named}: UTF-16 text. Save it as UTF-8.')
    line, _, rest = content.partition(b'\n')
    if b'\0' in line + rest[:1]:
        raise InputError(f'{named}: NUL characters in its first line (UTF-16, or no text). Save it as UTF-8 text.')
    return content.decode('utf-8-sig', 'surrogateescape')


def clean(text: Any, noun: str = 'caption') -> str:
    """Return a text in NFC, on one line, without control characters, byte order marks and double spaces.

    Args:
      noun: first word of error messages, such as 'caption' or 'line'.
    Raises:
      BadText: the cleaned text is empty, or the text is damaged.
    """
    if not isinstance(text, str):
        raise BadText(f'{noun} is not a text')
    if not is_unicode(text):
        raise BadText(f'{noun} is not valid Unicode (not UTF-8?)')
    if '\0' in text:
        raise BadText(f'{noun} has NUL characters (UTF-16? save it as UTF-8)')
    if '\ufffd' in text:
        raise BadText(f'{noun} has lost characters (U+FFFD)')
    text = unicodedata.normalize('NFC', text.replace('\ufeff', ''))
    kept = (' ' if unicodedata.category(character) == 'Cc' else character for character in text)
    cleaned = ' '.join(''.join(kept).split())
    # A text of only joiners and direction marks is invisible.
    if not any(unicodedata.category(character)[0] not in 'CZ' for character in cleaned):
        raise BadText(f'{noun} is empty')
    if len(cleaned) > MAX_CHARACTERS:
        raise BadText(f'{noun} has {len(cleaned)} characters (a quotation mark left open?)')
    return cleaned
