"""Read-ahead of the loader: its depth, its saved state, its failures and its end."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest

from train.runtime.loader import Loader
from train.runtime.sharding import MeshConfig, batch_sharding, make_mesh


class Numbers:
    """Samples that are their index; one of them cannot be read."""

    def __init__(self, broken: int = -1) -> None:
        self.broken, self.read = broken, 0

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        self.read += 1
        if index == self.broken:
            raise OSError('the disk is gone')
        return {'index': np.int32(index)}


def loader_of(source: Numbers) -> Loader:
    return Loader(source, batch_sharding(make_mesh(MeshConfig())), batch_size=8, seed=3)


def settled(value) -> Any:
    """Return a value once it has stayed the same for a while."""
    last, since = value(), time.monotonic()
    while time.monotonic() - since < 0.3:
        if value() != last:
            last, since = value(), time.monotonic()
        time.sleep(0.01)
    return last


def threads() -> int:
    return sum(thread.name == 'loader' for thread in threading.enumerate())


def test_one_batch_is_uploaded_ahead_and_a_few_are_read():
    source = Numbers()
    loader = loader_of(source)
    first = next(loader)
    assert isinstance(first['index'], jax.Array)
    assert loader._ahead is not None
    # The one in use, one on the devices, and at most the two that are read ahead with one that waits for them.
    assert settled(lambda: source.read) <= 8 * (1 + 1 + 2 + 1)
    assert source.read >= 8 * 3
    assert loader._ahead._results.qsize() == 1
    loader.close()


def test_state_is_that_of_the_last_batch_returned_whatever_is_uploaded():
    loader = loader_of(Numbers())
    begin, orders, states = loader.get_state(), [], []
    for _ in range(5):
        orders.append(np.asarray(next(loader)['index']))
        time.sleep(0.02)
        states.append(loader.get_state())
    for count, state in enumerate([begin, *states[:4]]):
        loader.set_state(state)
        assert loader.get_state() == state
        np.testing.assert_array_equal(next(loader)['index'], orders[count])
    loader.close()


def test_reader_gets_the_error_of_a_sample_each_time_it_asks():
    loader = loader_of(Numbers(broken=40))
    for _ in range(2):
        with pytest.raises(OSError, match='the disk is gone'):
            for _ in range(9):
                next(loader)
    loader.close()


def test_threads_end_with_their_loader():
    before = threads()
    loader = loader_of(Numbers())
    next(loader)
    assert threads() == before + 1
    loader.close()
    assert threads() == before
    forgotten = loader_of(Numbers())
    next(forgotten)
    del forgotten
    gc.collect()
    assert settled(threads) == before
