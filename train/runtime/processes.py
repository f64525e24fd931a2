"""The processes of a run: how they find each other, wait for each other, agree and leave."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from neodragon_jax.base.errors import InputError

# Seconds by which processes may differ in loading and compiling.
LONGEST_WAIT_S = 3600
# Every barrier needs its own name; all processes reach them in the same order.
_BARRIERS = itertools.count()

# Environment of a process where no cluster manager is detected.
PROCESS_VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def start_processes(distributed: bool = False) -> None:
    """Join the other processes of this run, if there are any. Call it before anything touches a device.

    The first of these that is present decides: JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID in the environment, as set by `train.launch`; TPU_WORKER_HOSTNAMES with several hosts, as set by GKE;
    the cluster that JAX detects, where `distributed` is set.

    Args:
      distributed: this is one of several processes on a TPU pod, under Slurm or under Open MPI.
    Raises:
      InputError: the processes cannot find each other with what is given.
    """
    if jax.distributed.is_initialized():
        return
    given = [name for name in PROCESS_VARIABLES if name in os.environ]
    if given:
        _join(*_process_numbers(given))
    elif distributed or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', ''):
        _join(None, None)
    elif jax.process_count() > 1:
        raise InputError(
            f'this is one of {jax.process_count()} processes: set distributed, so that they start together.'
        )


def _process_numbers(given: Sequence[str]) -> tuple[int, int]:
    """Return (number of processes, index of this one) from the environment, of which some variables are set."""
    try:
        count, index = int(os.environ['JAX_NUM_PROCESSES']), int(os.environ['JAX_PROCESS_ID'])
        if not (os.environ['JAX_COORDINATOR_ADDRESS'] and 0 <= index < count):
            raise ValueError(f'process {index} of {count}')
    except (KeyError, ValueError) as error:
        raise InputError(
            f'{" and ".join(given)} set without valid process numbers ({error}): set all of '
            f'{", ".join(PROCESS_VARIABLES)}, or none.'
        ) from None
    return count, index


def _join(count: int | None, index: int | None) -> None:
    """Start JAX's coordination service; with None it detects the cluster."""
    try:
        jax.distributed.initialize(num_processes=count, process_id=index)
    except ValueError as error:
        raise InputError(
            f'distributed is set, but JAX recognizes no cluster here ({error}): set {", ".join(PROCESS_VARIABLES)}, '
            'or unset it.'
        ) from None


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
