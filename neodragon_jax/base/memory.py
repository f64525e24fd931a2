"""Memory of this process."""

from __future__ import annotations

import pathlib
import re
import resource
import sys


def peak_memory_bytes() -> int:
    """Return the largest resident size of this process since its start, or since a reset through Linux's /proc.

    Linux reports it in /proc, without the moment when a new process is still a copy of its parent; getrusage, which
    other systems offer, includes that moment.
    """
    status = pathlib.Path('/proc/self/status')
    if status.is_file():
        found = re.search(r'VmHWM:\s+(\d+) kB', status.read_text())
        if found:
            return int(found[1]) * 1024
    # In kibibytes, on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
