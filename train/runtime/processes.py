"""Coordination of the processes of a run: start, barriers, agreement and exit."""

from __future__ import annotations

import itertools
import json
import os
import sys
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from neodragon_jax.base.json_file import parse_own_json

# Largest difference in seconds between processes in loading and compiling.
LONGEST_WAIT_S = 3600
# Every barrier needs a unique name; all processes reach the barriers in the same order.
_BARRIERS = itertools.count()


def wait_for_processes() -> None:
    """Wait until all processes of the run have called this function.

    Call it before the first collective after a compilation: collectives on CPU devices fail if a process is more than
    30 seconds late, and compilation times may differ by more.
    """
    if jax.process_count() > 1:
        everyone = set(range(jax.process_count()))
        multihost.sync_global_processes(f'barrier {next(_BARRIERS)}', processes=everyone, timeout=LONGEST_WAIT_S)


def exit_process(status: int) -> NoReturn:
    """End this process after an error that the other processes of the run do not share.

    A normal exit would wait minutes for the others. This exit status makes a launcher or cluster end them immediately.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        os._exit(status)
    sys.exit(status)


def of_first_process(value: Any) -> Any:
    """Return the JSON value of process 0, whose numbers may be not finite, on every process; all must call it."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8) if jax.process_index() == 0 else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    received = multihost_utils.broadcast_one_to_all(text if text.size == size else np.zeros(size, np.uint8))
    return parse_own_json(np.asarray(received, np.uint8).tobytes())
