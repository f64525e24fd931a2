"""Folders that several processes share: whether all of them see what the first one writes."""

from __future__ import annotations

import itertools
import os
import pathlib
import socket
import time
from typing import Any

import jax
from jax._src import distributed as coordination

from neodragon_jax.base.atomic import PathLike, made_folder, scratch_folder
from neodragon_jax.base.bucket import is_bucket
from neodragon_jax.base.errors import InputError

# Seconds in which a network disk must show a new file to all hosts.
_SEEN_WITHIN_S = 20.0
# Seconds that a process waits for the answers of the others; one that has failed by then says so itself.
_ANSWER_S = 120.0
_POLL_S = 0.2
# Seconds in which the others report the error: the end of process 0 ends them.
_TELL_S = 3.0
# Prefix of the keys of question and answers in JAX's coordination service.
_KEY = 'neodragon_jax/shared'
# All processes ask in the same order, and every question needs names of its own.
_QUESTIONS = itertools.count()
# Answer of a process that sees it; one that does not answers with the name of its host.
_SEEN = '/'


def require_shared(folder: PathLike, option: str) -> None:
    """Check that all processes of a run see one folder; all must call it, before long work. It is made if absent.

    Without this check, each host would write a part of a whole into a folder of its own, or wait for files of others
    that never come. Buckets are shared, and one process needs nothing.

    Args:
      option: the option that the folder is from, for error messages.
    Raises:
      InputError: on every process, if one of them does not see what process 0 writes; the message names their hosts.
      OSError: process 0 cannot write there.
    """
    client = coordination.global_state.client
    if client is None or jax.process_count() == 1 or is_bucket(folder):
        return
    key, path = f'{_KEY}/{next(_QUESTIONS)}', pathlib.Path(folder).absolute()
    if jax.process_index() == 0:
        blind = _ask(client, key, path)
    else:
        blind = _answer(client, key, path)
    if blind:
        raise InputError(
            f'{option} {folder}: the hosts do not share this folder; {blind}. Give a bucket, gs://BUCKET/PATH, or a '
            'folder of a network disk that every host mounts.'
        )


def _ask(client: Any, key: str, folder: pathlib.Path) -> str:
    """Write something, and return the processes that do not see it, in words; '' for none."""
    blind = ''
    try:
        with made_folder(folder), scratch_folder(folder) as probe:
            client.key_value_set(f'{key}/name', probe.name)
            answers = {process: _read(client, f'{key}/{process}') for process in range(1, jax.process_count())}
            found = [f'process {process} on {host}' for process, host in answers.items() if host not in ('', _SEEN)]
            if found:
                verb = 'do' if len(found) > 1 else 'does'
                blind = f'{", ".join(found)} {verb} not see what process 0 on {socket.gethostname()} writes there'
    finally:
        # Without a name, this process has failed and tells why; the others go on.
        client.key_value_set(f'{key}/name', '', allow_overwrite=True)
        client.key_value_set(f'{key}/blind', blind)
    if blind:
        time.sleep(_TELL_S)
    return blind


def _answer(client: Any, key: str, folder: pathlib.Path) -> str:
    """Look for what process 0 wrote; return the processes that do not see it, as `_ask`."""
    name, deadline = _read(client, f'{key}/name'), time.monotonic() + _SEEN_WITHIN_S
    seen = not name or os.path.exists(folder / name)
    while not seen and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        seen = os.path.exists(folder / name)
    client.key_value_set(f'{key}/{jax.process_index()}', _SEEN if seen else socket.gethostname())
    return _read(client, f'{key}/blind')


def _read(client: Any, key: str) -> str:
    """Return the value of a key, '' if no process sets it in time."""
    try:
        return client.blocking_key_value_get(key, round(_ANSWER_S * 1000))
    except Exception as error:
        if 'DEADLINE_EXCEEDED' not in str(error):
            raise
        return ''
