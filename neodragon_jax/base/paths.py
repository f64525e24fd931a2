"""Conversion of a user's text to a path: the only module that decides the kind of path.

| text | path |
|---|---|
| `dir/x`, `/dir/x`, `my dir/x` | as typed; relative to the current folder |
| `~/x`, `~name/x` | in a home folder |
| `file:///dir/x`, `FILE:///dir/x` | `/dir/x` |
| `gs://bucket/x`, `GS://bucket/x` | in a bucket, for `storage_path` and `input_path`; refused by `user_path` |
| `gs:/x`, `s3://x`, `hf://x`, `https://x`, `word://x` | refused, with the remedy |
"""

from __future__ import annotations

import errno
import os
import pathlib
import re
import urllib.parse
from collections.abc import Sequence

from etils import epath

from neodragon_jax.base.bucket import SCHEME, StoragePath, staged
from neodragon_jax.base.errors import InputError

_SCHEME = re.compile(r'([A-Za-z][A-Za-z0-9+.-]*):(/+)(.*)', re.DOTALL)
# Bucket and object of gs://BUCKET/OBJECT.
_BUCKET = re.compile(r'([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/(.*))?', re.DOTALL)
_REMEDIES = {
    'gs': 'mount the bucket (Cloud Storage FUSE) and give its folder; or give a local folder, and copy to or from the '
    'bucket with gcloud storage cp -r.',
    's3': 'give a local folder, and copy to or from the bucket with aws s3 cp --recursive.',
    'hf': 'only --checkpoint, --student and --start take names of the Hugging Face hub, hf://ORG/NAME@REVISION.',
    'http': 'download it first, and give the path of the file.',
    'https': 'download it first, and give the path of the file.',
}


def storage_path(text: str | os.PathLike[str], option: str) -> StoragePath:
    """Return the path that a user typed, on a local disk or in a bucket, gs://BUCKET/PATH.

    Args:
      option: the option that the text is from, for error messages.
    Raises:
      InputError: as of `user_path`, or a bucket or an object cannot have this name.
    """
    _check_text(os.fspath(text), option)
    match = _SCHEME.fullmatch(os.fspath(text))
    if match is None or match[1].lower() != 'gs' or len(match[2]) < 2:
        return user_path(text, option)
    named = _BUCKET.fullmatch(match[3]) if len(match[2]) == 2 else None
    if named is None:
        raise InputError(f'{option} {text}: no bucket can have this name; write gs://BUCKET/PATH in lower case.')
    parts = [part for part in (named[2] or '').split('/') if part]
    if {'.', '..'} & set(parts):
        raise InputError(f'{option} {text}: a bucket has no . or .. in its paths; write the whole path.')
    return epath.Path(SCHEME + '/'.join([named[1], *parts]))


def input_path(text: str | os.PathLike[str], option: str, parts: Sequence[str] | None = None) -> pathlib.Path:
    """Return the local path of an input that a user typed, after copying it from its bucket if it is in one.

    Args:
      option: the option that the text is from, for error messages.
      parts: subfolders to copy from a bucket, besides the files of the folders that they are in; None copies all.
    Raises:
      InputError: as of `storage_path` and `neodragon_jax.base.bucket.staged`.
    """
    return staged(storage_path(text, option), option, parts)


def user_path(text: str | os.PathLike[str], option: str) -> pathlib.Path:
    """Return the local path that a user typed.

    Args:
      option: the option that the text is from, for error messages.
    Raises:
      InputError: the text is empty, of a scheme that is not a local path, or cannot be a path; its links form a circle.
    """
    text = os.fspath(text)
    _check_text(text, option)
    match = _SCHEME.fullmatch(text)
    if match is not None and _is_scheme(match):
        return _of_scheme(text, option, match)
    try:
        path = pathlib.Path(text).expanduser()
    except RuntimeError:
        raise InputError(f'{option} {text}: no such user on this machine; give the whole path.') from None
    if _is_circle(path):
        raise InputError(f'{option} {text}: links form a circle; correct the path, or remove the links.')
    return path


def _is_circle(path: pathlib.Path) -> bool:
    """Return whether the links of a path lead back to themselves. Such a path cannot be resolved."""
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _check_text(text: str, option: str) -> None:
    """Raise InputError if a text cannot be a path."""
    if not text:
        raise InputError(f'{option} is empty; give a path (is a shell variable unset?).')
    if any(ord(character) < 32 for character in text):
        raise InputError(f'{option} {text!r} has control characters; correct the path.')


def has_scheme(text: str | os.PathLike[str], schemes: Sequence[str]) -> bool:
    """Return whether a text is an address of one of some schemes, such as 'hf', with one or two slashes."""
    match = _SCHEME.fullmatch(os.fspath(text))
    return match is not None and match[1].lower() in schemes


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
    raise InputError(f'{option} {text}: {remedy}')
