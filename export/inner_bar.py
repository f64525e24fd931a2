"""Progress within one step of the work that takes minutes at full size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import tqdm


@contextlib.contextmanager
def inner_bar(what: str, total: int) -> Iterator[Callable[..., object]]:
    """Yield a function that moves a bar by one, whatever it is called with; the bar is on terminals only, and goes."""
    with tqdm.tqdm(total=total, desc=what, leave=False, disable=None) as bar:
        yield lambda *_: bar.update()
