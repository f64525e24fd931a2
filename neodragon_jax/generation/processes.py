"""Several processes that share one list of prompts."""

from __future__ import annotations

import os
from typing import Any

import jax

from neodragon_jax.base.errors import InputError

# Seconds that a process waits at its end for the others, which may have longer videos to make.
SHUTDOWN_TIMEOUT = 24 * 3600


def start_processes() -> tuple[int, int]:
    """Join the other processes of this run; return this one's index and their number.

    Processes on a TPU pod, under Slurm or under Open MPI find each other. Elsewhere they need the variables
    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      InputError: the processes cannot find each other with these variables.
    """
    given: dict[str, Any] = {}
    try:
        if 'JAX_COORDINATOR_ADDRESS' in os.environ:
            given['num_processes'] = int(os.environ['JAX_NUM_PROCESSES'])
            given['process_id'] = int(os.environ['JAX_PROCESS_ID'])
        jax.distributed.initialize(**given, shutdown_timeout_seconds=SHUTDOWN_TIMEOUT)
    except (KeyError, ValueError) as error:
        raise InputError(
            f'--distributed, but JAX recognizes no cluster here ({error}): set JAX_COORDINATOR_ADDRESS, '
            'JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave the option out.'
        ) from None
    return jax.process_index(), jax.process_count()
