"""The processes of a run: how they find each other, wait for each other, agree and leave."""

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

# Seconds by which processes may differ in loading and compiling.
LONGEST_WAIT_S = 3600
# Every barrier needs its own name; all processes reach them in the same order.
_BARRIERS = itertools.count()


def wait_for_processes() -> None:
    """Return when all processes of the run have called this, as before the first collective after a compilation.

    Collectives on CPU devices fail after 30 seconds without their partners; compilation times may differ by more.
    """
    if jax.process_count() > 1:
        everyone = set(range(jax.process_count()))
        multihost.sync_global_processes(f'barrier {next(_BARRIERS)}', processes=everyone, timeout=LONGEST_WAIT_S)


def leave(status: int) -> NoReturn:
    """End this process after an error that the other processes of the run do not share.

    An ordinary exit waits minutes for the others. A launcher or cluster that sees the status ends them at once.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        os._exit(status)
    sys.exit(status)


def of_first_process(value: Any) -> Any:
    """Return the JSON value of process 0 on every process; all must call it."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8) if jax.process_index() == 0 else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    received = multihost_utils.broadcast_one_to_all(text if text.size == size else np.zeros(size, np.uint8))
    return json.loads(np.asarray(received, np.uint8).tobytes())
