"""Conversion of a user's text to a path: the only module that decides the kind of path.

| text | path |
|---|---|
| `dir/x`, `/dir/x`, `my dir/x` | as typed; relative to the current folder |
| `~/x`, `~name/x` | in a home folder |
| `file:///dir/x`, `FILE:///dir/x` | `/dir/x` |
| `gs://x`, `gs:/x`, `s3://x`, `hf://x`, `https://x`, `word://x` | refused, with the remedy |
"""

from __future__ import annotations

import os
import pathlib
import re
import urllib.parse

from neodragon_jax.base.errors import InputError

_SCHEME = re.compile(r'([A-Za-z][A-Za-z0-9+.-]*):(/+)(.*)', re.DOTALL)
_REMEDIES = {
    'gs': 'mount the bucket (Cloud Storage FUSE) and give its folder, or copy it here: gcloud storage cp -r {text} .',
    's3': 'copy it to this machine first: aws s3 cp --recursive {text} .',
    'hf': 'only --checkpoint and --student take names of the Hugging Face hub, hf://ORG/NAME@REVISION.',
    'http': 'download it first, and give the path of the file.',
    'https': 'download it first, and give the path of the file.',
}


def user_path(text: str | os.PathLike[str], option: str) -> pathlib.Path:
    """Return the local path that a user typed.

    Args:
      option: the option that the text is from, for error messages.
    Raises:
      InputError: the text is empty, of a scheme that is not a local path, or cannot be a path.
    """
    text = os.fspath(text)
    if not text:
        raise InputError(f'{option} is empty; give a path (is a shell variable unset?).')
    if any(ord(character) < 32 for character in text):
        raise InputError(f'{option} {text!r} has control characters; correct the path.')
    match = _SCHEME.fullmatch(text)
    if match is not None and _is_scheme(match):
        return _of_scheme(text, option, match)
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:
        raise InputError(f'{option} {text}: no such user on this machine; give the whole path.') from None


def _is_scheme(match: re.Match[str]) -> bool:
    """Return whether 'word:/rest' names a scheme; 'word:/rest' of an unknown word may be a local file."""
    return len(match[2]) > 1 or match[1].lower() in (*_REMEDIES, 'file')


def _of_scheme(text: str, option: str, match: re.Match[str]) -> pathlib.Path:
    """Return the path of a text with a scheme, or refuse it."""
    scheme, slashes, rest = match[1].lower(), match[2], match[3]
    if scheme == 'file':
        if len(slashes) == 2:
            raise InputError(f'{option} {text}: names a host; write file:///{rest} for a file of this machine.')
        return pathlib.Path('/' + urllib.parse.unquote(rest))
    if len(slashes) == 1 and scheme in _REMEDIES:
        raise InputError(f'{option} {text}: one slash is missing; write {scheme}://{rest} or ./{text}.')
    remedy = _REMEDIES.get(scheme, 'this kind of address is not supported; give the path of a file or a folder.')
    raise InputError(f'{option} {text}: {remedy.format(text=text)}')
