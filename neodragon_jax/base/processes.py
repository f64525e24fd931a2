"""Start the processes of one run, which share a mesh of devices."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax._src import distributed as coordination
from jax._src.clusters import ClusterEnv

from neodragon_jax.base.atomic import PathLike
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.roll_call import PROCESS_VARIABLES, START_TIMEOUT_S, roll_call
from neodragon_jax.base.shared_folder import require_shared

# Seconds that a finished process waits for the others, which may have hours of work left. JAX alone would wait 300 s,
# and then end all processes, those that still work included.
LONGEST_WAIT_S = 24 * 3600
# Key of JAX's coordination service under which a process that fails leaves its reason, followed by its number.
_FAILURE = 'neodragon_jax/failure/'
# Seconds between two looks for the failures of others.
_LOOK_EVERY_S = 2.0


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


@contextlib.contextmanager
def separate_shares(
    distributed: bool, timeout_s: float = START_TIMEOUT_S, folder: PathLike | None = None
) -> Iterator[tuple[int, int]]:
    """Join the other processes of a run, each of which does a share of the work; yield the own index and their number.

    The processes share no steps: SIGTERM ends the process that gets it, and one that fails does not stop the others.
    Its reason is printed by all of them, until the last one has finished.

    Args:
      distributed, timeout_s: as of `start_processes`.
      folder: option --out, into which all write their shares; a bucket, or on a disk that all hosts share.
    Raises:
      InputError: as of `start_processes`, or the hosts do not share the folder.
    """
    start_processes(distributed, timeout_s, shared_steps=False)
    index, count = jax.process_index(), jax.process_count()
    client, end = coordination.global_state.client, threading.Event()
    if client is None:
        yield index, count
        return
    thread = threading.Thread(target=_tell_failures, args=(client, index, end), name='failures', daemon=True)
    thread.start()
    try:
        if folder is not None:
            require_shared(folder, '--out')
        yield index, count
        _wait_for_all()  # here rather than at the exit, so that the failures of the others are still told
        atexit.unregister(_wait_for_all)
    except Exception as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        with contextlib.suppress(Exception):  # without process 0 nobody can be told
            client.key_value_set(
                f'{_FAILURE}{index}', f'process {index} of {count} on {socket.gethostname()}: {reason}'
            )
        print('this process fails, and ends when the others have finished their shares.', file=sys.stderr, flush=True)
        raise
    finally:
        end.set()
        thread.join()


def _wait_for_all() -> None:
    """Wait until all processes have finished, before JAX shuts down the coordination.

    The limit of that shutdown cannot be set: the options of `jax.distributed.initialize` reach process 0 only.
    """
    client = coordination.global_state.client
    with contextlib.suppress(Exception):  # a process is gone; JAX then ends this one
        if client is not None:
            client.wait_at_barrier('neodragon_jax/finished', LONGEST_WAIT_S * 1000)


def _tell_failures(client: Any, index: int, end: threading.Event) -> None:
    """Print the reason of every other process that fails, until `end`."""
    told = {f'{_FAILURE}{index}'}
    while not end.wait(_LOOK_EVERY_S):
        with contextlib.suppress(Exception):  # process 0 may be gone; JAX then ends this process
            for name, reason in client.key_value_dir_get(_FAILURE):
                if name not in told:
                    told.add(name)
                    print(
                        f'another process has failed, and its share is missing: {reason}', file=sys.stderr, flush=True
                    )


def start_processes(
    distributed: bool = False, timeout_s: float = START_TIMEOUT_S, *, shared_steps: bool = True
) -> None:
    """Join the other processes of this run, if there are any. Call it before anything touches a device.

    The first source that is present decides: JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID in the environment; TPU_WORKER_HOSTNAMES, which GKE sets on TPU slices of several hosts; the
    cluster that JAX recognizes, where `distributed` is set.

    Args:
      distributed: whether this process is one of several on a TPU pod, under Slurm or under Open MPI.
      timeout_s: seconds after which a missing process is an error.
      shared_steps: whether the processes run the same steps, so that SIGTERM to one of them stops all at the same step:
        JAX takes the signal, and the program must ask for it (`Checkpoints.preempted`). Otherwise SIGTERM ends the
        process that gets it.
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
    jax.config.update('jax_enable_preemption_service', shared_steps)
    jax.distributed.initialize(
        coordinator_address=place.address,
        num_processes=place.count,
        process_id=place.index,
        local_device_ids=place.devices,
    )
    atexit.register(_wait_for_all)  # runs before JAX's own function, which was registered first


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
