"""Lookup of a checkpoint by its folder, by the name of one shipped with the package, or by its name on the hub."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from neodragon_jax.base.bucket import is_bucket
from neodragon_jax.base.errors import InputError, did_you_mean
from neodragon_jax.base.files import is_there
from neodragon_jax.base.paths import input_path, storage_path, user_path
from neodragon_jax.checkpoint import hub

FOLDER = pathlib.Path(__file__).parent.parent / 'assets'
DEFAULT = 'moving_shapes'


def names() -> list[str]:
    """Return the names of the shipped checkpoints."""
    return sorted(path.name for path in FOLDER.glob('*') if path.is_dir())


def find(
    given: str | os.PathLike[str] | None, needed: Sequence[str] | None = None, option: str = '--checkpoint'
) -> pathlib.Path:
    """Return the root folder of a checkpoint.

    Args:
      given: a folder, also of a bucket, else the name of a shipped checkpoint, else one of the hub
        (`hf://ORG/NAME@REVISION`, or `ORG/NAME`); None is the shipped DEFAULT.
      needed: component folders to download from the hub; None downloads all.
      option: the option that names the checkpoint, for messages.
    Raises:
      InputError: neither a folder nor a name matches, or the files cannot be downloaded from the hub.
    """
    known = names()
    if given is None:
        if DEFAULT not in known:
            raise InputError(
                f'{option} is not given, and {DEFAULT} is not installed with this package. Pass the root folder '
                f'of a checkpoint with {option}, or install the package again.'
            )
        return FOLDER / DEFAULT
    given = os.fspath(given)
    name = hub.parse(given)
    if hub.is_explicit(given):
        if name is None:
            raise InputError(f'{option} {given}: not a name of the hub; write hf://ORG/NAME@REVISION.')
        return hub.fetch(name, needed, option)
    if given and is_bucket(storage_path(given, option)):
        return input_path(given, option, needed)
    # An empty name comes from an unset variable and must not mean the current folder.
    if given and is_there(user_path(given, option)) and user_path(given, option).is_dir():
        return user_path(given, option)
    if given in known:
        return FOLDER / given
    said = ''
    if name is not None and not user_path(given, option).parent.is_dir():
        try:
            return hub.fetch(name, needed, option)
        except InputError as error:
            said = ' ' + str(error).removeprefix(f'{option} ')
    shipped = f'the name of a shipped one: {", ".join(known)}.' if known else 'nothing else: none is shipped.'
    raise InputError(
        f'{option} {given}: no such checkpoint folder.{did_you_mean(given, known)} Pass the folder that holds '
        f'diffusion_transformer_320p/ etc., or {shipped}{said}'
    )
