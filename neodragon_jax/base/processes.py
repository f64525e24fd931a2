"""Start the processes of one run, which share a mesh of devices."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax._src.clusters import ClusterEnv

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.roll_call import PROCESS_VARIABLES, START_TIMEOUT_S, roll_call


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process among those of its run.

    Attributes:
      address: host:port of process 0.
      devices: indices of the local devices that belong to this process; None for all.
    """

    address: str
    count: int
    index: int
    devices: Sequence[int] | None = None


def start_processes(distributed: bool = False, timeout_s: float = START_TIMEOUT_S, **options: Any) -> None:
    """Join the other processes of this run, if there are any. Call it before anything touches a device.

    The first source that is present decides: JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID in the environment; TPU_WORKER_HOSTNAMES, which GKE sets on TPU slices of several hosts; the
    cluster that JAX recognizes, where `distributed` is set.

    Args:
      distributed: whether this process is one of several on a TPU pod, under Slurm or under Open MPI.
      timeout_s: seconds after which a missing process is an error.
      options: further arguments of `jax.distributed.initialize`.
    Raises:
      InputError: the processes cannot find each other with the given variables, or one of them is missing.
    """
    if jax.distributed.is_initialized():
        return
    given = [name for name in PROCESS_VARIABLES if name in os.environ]
    if given:
        place = _given_place(given)
    elif distributed or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', ''):
        place = _recognized_place(timeout_s)
    elif jax.process_count() > 1:
        raise InputError(
            f'this is one of {jax.process_count()} processes: set distributed, so that they start together.'
        )
    else:
        return
    roll_call(place.address, place.count, place.index, timeout_s)
    jax.distributed.initialize(
        coordinator_address=place.address,
        num_processes=place.count,
        process_id=place.index,
        local_device_ids=place.devices,
        **options,
    )


def _given_place(given: Sequence[str]) -> Place:
    """Return the place that the environment describes, where some of PROCESS_VARIABLES are set."""
    try:
        count, index = int(os.environ['JAX_NUM_PROCESSES']), int(os.environ['JAX_PROCESS_ID'])
        address = os.environ['JAX_COORDINATOR_ADDRESS']
        if not (address and 0 <= index < count):
            raise ValueError(f'process {index} of {count}')
    except (KeyError, ValueError) as error:
        raise InputError(
            f'{" and ".join(given)} set without valid process numbers ({error}): set all of '
            f'{", ".join(PROCESS_VARIABLES)}, or none.'
        ) from None
    return Place(address, count, index)


def _recognized_place(timeout_s: float) -> Place:
    """Return the place in the cluster that JAX recognizes.

    `jax.distributed.initialize` would use the same place, but aborts if a process is missing; the roll call comes
    before it. JAX has no public function for the place.
    """
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, round(timeout_s))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f'the cluster that JAX recognizes here does not describe its processes: {error}.') from None
    address, count, index, devices = found
    if address is None or count is None or index is None:
        raise InputError(
            f'distributed is set, but JAX recognizes no cluster here. Set {", ".join(PROCESS_VARIABLES)}, or leave '
            'distributed out.'
        )
    return Place(address, count, index, devices)
