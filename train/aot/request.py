"""Requests to the compiling process (`train.aot.worker`), and its environment."""

from __future__ import annotations

import dataclasses

# Environment of the process: do not look for a TPU, print nothing, and share libtpu with other processes.
QUIET = {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
    'TPU_WORKER_ID': '0',
    'TPU_MIN_LOG_LEVEL': '3',
    'TF_CPP_MIN_LOG_LEVEL': '3',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
# Exit status after an InputError; its message is the result.
INPUT_ERROR = 2


@dataclasses.dataclass(frozen=True)
class Request:
    """A request to compile one step.

    Attributes:
      settings: settings of the program, as JSON.
      slices: number of slices of the topology.
      variant: text of one of the program's variants.
      flags: compiler flags.
      cache: folder of results.
    """

    program: str
    settings: str
    topology: str
    slices: int
    variant: str
    flags: dict[str, str]
    cache: str
