"""Checkpoints that cannot be read: which errors say that one is damaged, and which that nothing of it is lost."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import Any

from neodragon_jax.base.bucket import StoragePath
from neodragon_jax.base.errors import InputError

_MEMORY = 'the state does not fit into the memory; resume on more devices, or spread it over more of them.'
_ACCESS = 'give this user or service account access to it.'
_AGAIN = 'run the same command again; if this repeats, check the disk or the network.'
# Status codes of XLA, TensorStore and gRPC that say nothing about the content of a file.
_CODES = {
    'RESOURCE_EXHAUSTED': _MEMORY,
    'PERMISSION_DENIED': _ACCESS,
    'UNAUTHENTICATED': _ACCESS,
    'UNAVAILABLE': _AGAIN,
    'DEADLINE_EXCEEDED': _AGAIN,
    'ABORTED': _AGAIN,
    'CANCELLED': _AGAIN,
    'INTERNAL': _AGAIN,
    'UNKNOWN': _AGAIN,
}
_CODE = re.compile(rf'\b({"|".join(_CODES)})\b')
# Libraries whose errors are of a network; none of them has a common class.
_NETWORK = ('aiohttp', 'gcsfs', 'google', 'grpc', 'requests', 'urllib3')
# What the readers of a file raise where its content is wrong.
_CONTENT = (ValueError, LookupError, TypeError, EOFError, AttributeError)


def damaged(path: StoragePath, reason: str) -> InputError:
    """Return the error of a damaged checkpoint."""
    return InputError(f'{path}: the checkpoint is damaged ({reason}); delete this folder to continue without it.')


def is_damage(error: Exception) -> bool:
    """Return whether an error of reading a checkpoint says that files are missing or have other content."""
    causes = list(_causes(error))
    return any(map(_is_content, causes)) and not any(map(_remedy, causes)) and not isinstance(error, InputError)


def raise_unless_damaged(path: StoragePath, error: Exception) -> None:
    """Return if an error of reading a checkpoint says that it is damaged.

    Raises:
      InputError: nothing of the checkpoint is lost, for instance where the devices or the network lack something.
      Exception: the error itself, if it is of another kind.
    """
    if is_damage(error):
        return
    for cause in _causes(error):
        remedy = _remedy(cause)
        if remedy:
            raise InputError(
                f'{path}: the checkpoint cannot be read now ({described(cause)}). Keep it, nothing of it is lost: '
                f'{remedy}'
            ) from error
    raise error


def described(error: BaseException) -> str:
    """Return the class and the first line of an error."""
    return f'{type(error).__name__}: {error}'.splitlines()[0].rstrip(' :.')[:160]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, the members of a group, and the errors that led to it."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop(0)
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            yield found
            members: Any = found.exceptions if isinstance(found, BaseExceptionGroup) else ()
            waiting += [*members, found.__cause__, None if found.__suppress_context__ else found.__context__]


def _remedy(error: BaseException) -> str:
    """Return what to do about an error that says nothing about the checkpoint's files; '' for another error."""
    if isinstance(error, MemoryError):
        return _MEMORY
    if isinstance(error, OSError) and not _is_content(error):
        return _ACCESS if error.errno in (errno.EACCES, errno.EPERM) else _AGAIN
    code = _CODE.search(str(error))
    if code:
        return _CODES[code[1]]
    return _AGAIN if type(error).__module__.partition('.')[0] in _NETWORK else ''


def _is_content(error: BaseException) -> bool:
    """Return whether an error is of the kinds that missing files and other content have."""
    missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return missing or isinstance(error, _CONTENT) or 'DATA_LOSS' in str(error)
