"""What a step of the work takes: seconds, and the peak memory of this process while it lasts."""

from __future__ import annotations

import contextlib
import pathlib
import re
import time
from collections.abc import Iterator, Mapping

Spent = Mapping[str, float | None]  # `seconds` and `peak_gb`
_CLEAR, _RESET_PEAK = pathlib.Path('/proc/self/clear_refs'), '5'


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float | None]]:
    """Yield a table that has `seconds` and `peak_gb` when the block ends.

    The peak is None where the kernel does not let a process reset its own: it would be that of all steps before, too.
    """
    spent: dict[str, float | None] = {}
    try:
        _CLEAR.write_text(_RESET_PEAK)
        known = True
    except OSError:
        known = False
    start = time.monotonic()
    yield spent
    spent |= {'seconds': round(time.monotonic() - start, 1), 'peak_gb': round(peak_gb(), 2) if known else None}


def peak_gb() -> float:
    """Return the peak memory of this process since it began, or since it was reset.

    From /proc, because getrusage also counts the moment when a new process is still a copy of its parent.
    """
    status = pathlib.Path('/proc/self/status').read_text()
    (kibibytes,) = re.findall(r'VmHWM:\s+(\d+) kB', status)
    return int(kibibytes) * 1024 / 1e9
