"""Cleaning of typed prompts, as `neodragon_jax/base/text.py` does it: the same text gives the same video."""

from __future__ import annotations

import unicodedata

from neodragon_phone.errors import BundleError

MAX_CHARACTERS = 10_000


def clean(prompt: str) -> str:
    """Return a prompt in NFC, on one line, without control characters, byte order marks and double spaces.

    Raises:
      BundleError: the cleaned prompt is empty, or the prompt is damaged.
    """
    if any('\ud800' <= character <= '\udfff' for character in prompt):
        # Python turns bytes of a command line that are not UTF-8 into surrogates.
        raise _refused(prompt, 'is not valid Unicode (not UTF-8?)')
    if '\0' in prompt:
        raise _refused(prompt, 'has NUL characters (UTF-16? save it as UTF-8)')
    if '\ufffd' in prompt:
        raise _refused(prompt, 'has lost characters (U+FFFD)')
    text = unicodedata.normalize('NFC', prompt.replace('\ufeff', ''))
    text = ''.join(' ' if unicodedata.category(character) == 'Cc' else character for character in text)
    cleaned = ' '.join(text.split())
    # A text of only joiners and direction marks is invisible.
    if not any(unicodedata.category(character)[0] not in 'CZ' for character in cleaned):
        raise _refused(prompt, 'is empty')
    if len(cleaned) > MAX_CHARACTERS:
        raise _refused(prompt, f'has {len(cleaned)} characters (a quotation mark left open?)')
    return cleaned


def _refused(prompt: str, reason: str) -> BundleError:
    return BundleError(f'--prompt {prompt[:200]!r}: text {reason}; correct it.')
