"""Time and peak memory of a step, and the progress bar of one that takes minutes."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping

import tqdm

from neodragon_jax.base.memory import peak_memory_bytes

Resources = Mapping[str, float | None]  # keys `seconds` and `peak_gb`
_CLEAR, _RESET_PEAK = pathlib.Path('/proc/self/clear_refs'), '5'


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float | None]]:
    """Yield a table that holds `seconds` and `peak_gb` of this process when the block ends.

    The peak is None where the kernel refuses to reset it: it would then include all earlier steps.
    """
    resources: dict[str, float | None] = {}
    try:
        _CLEAR.write_text(_RESET_PEAK)
        known = True
    except OSError:
        known = False
    start = time.monotonic()
    yield resources
    resources |= {'seconds': round(time.monotonic() - start, 1), 'peak_gb': round(peak_gb(), 2) if known else None}


def peak_gb() -> float:
    """Return the peak memory of this process in GB since it began, or since the peak was reset."""
    return peak_memory_bytes() / 1e9


@contextlib.contextmanager
def inner_bar(description: str, total: int) -> Iterator[Callable[..., object]]:
    """Yield a function that advances a progress bar by one and ignores its arguments.

    The bar appears on terminals only and is removed at the end.
    """
    with tqdm.tqdm(total=total, desc=description, leave=False, disable=None) as bar:
        yield lambda *_: bar.update()
