"""Start of several processes that share one list of prompts."""

from __future__ import annotations

import jax

from neodragon_jax.base import processes

# Seconds that a finished process waits for the others, which may have longer videos to generate.
SHUTDOWN_TIMEOUT = 24 * 3600


def join_processes(timeout_s: float) -> tuple[int, int]:
    """Join the other processes of this run; return this one's index and their number.

    Args:
      timeout_s: seconds after which a missing process is an error.

    Raises:
      InputError: the processes cannot find each other, see `base.processes`.
    """
    processes.start_processes(True, timeout_s, shutdown_timeout_seconds=SHUTDOWN_TIMEOUT)
    return jax.process_index(), jax.process_count()
