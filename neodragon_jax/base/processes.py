"""Start the processes of one run, which share a mesh of devices."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.roll_call import roll_call

# Environment variables that describe the run to a process without a cluster manager.
PROCESS_VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def start_processes(distributed: bool = False, **options: Any) -> None:
    """Join the other processes of this run, if there are any. Call it before anything touches a device.

    The first source that is present decides: JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID in the environment; TPU_WORKER_HOSTNAMES, which GKE sets on TPU slices of several hosts; the
    cluster that JAX recognizes, where `distributed` is set.

    Args:
      distributed: whether this process is one of several on a TPU pod, under Slurm or under Open MPI.
      options: further arguments of `jax.distributed.initialize`.
    Raises:
      InputError: the processes cannot find each other with the given variables.
    """
    if jax.distributed.is_initialized():
        return
    given = [name for name in PROCESS_VARIABLES if name in os.environ]
    if given:
        count, index = _process_numbers(given)
        roll_call(os.environ['JAX_COORDINATOR_ADDRESS'], count, index)
        _join(count, index, options)
    elif distributed or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', ''):
        _join(None, None, options)
    elif jax.process_count() > 1:
        raise InputError(
            f'this is one of {jax.process_count()} processes: set distributed, so that they start together.'
        )


def _process_numbers(given: Sequence[str]) -> tuple[int, int]:
    """Return (processes, index of this one) from the environment, where some of the variables are set."""
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


def _join(count: int | None, index: int | None, options: Mapping[str, Any]) -> None:
    """Start JAX's coordination; with None JAX recognizes the cluster."""
    try:
        jax.distributed.initialize(num_processes=count, process_id=index, **options)
    except ValueError as error:
        raise InputError(
            f'distributed is set, but JAX recognizes no cluster here ({error}): set {", ".join(PROCESS_VARIABLES)}, '
            'or unset it.'
        ) from None
