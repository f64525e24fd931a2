"""The checkpoints that are installed with the package, and how a command line names one."""

from __future__ import annotations

import os
import pathlib

from neodragon_jax.base.errors import InputError, did_you_mean
from neodragon_jax.base.paths import user_path

FOLDER = pathlib.Path(__file__).parent.parent / 'assets'
DEFAULT = 'moving_shapes'


def names() -> list[str]:
    """Return the names of the shipped checkpoints."""
    return sorted(path.name for path in FOLDER.glob('*') if path.is_dir())


def find(given: str | os.PathLike[str] | None) -> pathlib.Path:
    """Return the root folder of a checkpoint.

    Args:
      given: a folder, or else the name of a shipped checkpoint; None is the shipped DEFAULT.
    Raises:
      InputError: there is no such folder, and no shipped checkpoint has that name.
    """
    known = names()
    if given is None:
        if DEFAULT not in known:
            raise InputError(
                f'--checkpoint is not given, and {DEFAULT} is not installed with this package. Pass the root folder '
                'of a checkpoint with --checkpoint, or install the package again.'
            )
        return FOLDER / DEFAULT
    given = os.fspath(given)
    # An empty name is a variable that was not set, not the current folder.
    if given and user_path(given, '--checkpoint').is_dir():
        return user_path(given, '--checkpoint')
    if given in known:
        return FOLDER / given
    shipped = f'the name of a shipped one: {", ".join(known)}.' if known else 'nothing else: none is shipped.'
    raise InputError(
        f'--checkpoint {given}: no such checkpoint folder.{did_you_mean(given, known)} Pass the folder that holds '
        f'diffusion_transformer_320p/ etc., or {shipped}'
    )
