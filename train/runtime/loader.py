"""Loader of batches onto devices, in an order that depends on the seed only.

Each process reads only the rows that its devices hold. A run that resumes on another mesh or another number of
processes therefore reads the same batches in the same rows.

Two stages prefetch: threads read host batches, and one thread uploads the next batch while the devices compute.
"""

from __future__ import annotations

import copy
import functools
import math
import queue
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Self

import grain
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from neodragon_jax.base.errors import InputError
from train.data import Source
from train.runtime.sharding import batch_groups

# Threads suffice for stored arrays: reading and copying them releases the GIL.
READ_THREADS = 2
# Batches read ahead in host memory, and in device memory besides the one in use.
BATCHES_AHEAD, UPLOADS_AHEAD = 2, 1

Batch = dict[str, jax.Array]


class Loader:
    """Endless shuffled batches: [batch, ...] arrays, or [updates, batch, ...] of different samples.

    Every epoch has its own order, and batches continue across epochs, so no sample is left out.
    """

    def __init__(
        self, source: Source, sharding: NamedSharding, *, batch_size: int, updates: int | None = None, seed: int = 0
    ) -> None:
        """Begin at the first batch.

        Args:
          sharding: from `train.runtime.sharding.batch_sharding`, with axis 1 if `updates` is given, else 0.
          batch_size: samples in a batch over all devices and processes.
          updates: batches stacked along a leading axis, for programs that make several updates in one step.
        Raises:
          InputError: there are no samples, or the mesh does not divide the batch.
        """
        self._sharding, self._leading = sharding, _leading(source, sharding, batch_size, updates)
        read = functools.partial(_read, source, self._leading, _local_rows(sharding, self._leading))
        order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().batch(math.prod(self._leading))
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD)
        self._batches = iter(order.map(read).to_iter_dataset(options))
        self._place = self._batches.get_state()
        self._ahead: _Ahead | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._ahead is None:
            self._ahead = _Ahead(_uploaded(self._batches, self._sharding, self._leading))
            weakref.finalize(self, self._ahead.stop)
        batch, self._place = self._ahead.next()
        return batch

    def get_state(self) -> dict[str, Any]:
        """Return the position after the last returned batch as JSON, equal on every process."""
        return self._place

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a position of `get_state`."""
        self._stop()
        self._batches.set_state(dict(state))
        self._place = dict(state)

    def close(self) -> None:
        """Stop prefetching."""
        self._stop()
        self._batches.close()

    def _stop(self) -> None:
        """Drop the uploaded batches that have not been returned."""
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead.join()
            self._ahead = None


class _Ahead:
    """Prefetching iterator: runs an iterator in a thread, a few items ahead of its reader."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._permits, self._stopped = threading.Semaphore(UPLOADS_AHEAD), threading.Event()
        arguments = items, self._results, self._permits, self._stopped
        self._thread = threading.Thread(target=_work_ahead, args=arguments, name='loader', daemon=True)
        self._thread.start()

    def next(self) -> Any:
        """Return the next item, or raise the iterator's error."""
        item, error = self._results.get()
        if error is not None:
            self._results.put((None, error))  # for the next call
            raise error
        self._permits.release()
        return item

    def stop(self) -> None:
        """Ask the thread to end after its current item."""
        self._stopped.set()
        self._permits.release()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()


def _work_ahead(
    items: Iterator[Any],
    results: queue.SimpleQueue[tuple[Any, BaseException | None]],
    permits: threading.Semaphore,
    stopped: threading.Event,
) -> None:
    """Pass on items as permits allow. The thread holds no reference to the reader, so it ends with the reader."""
    try:
        while permits.acquire() and not stopped.is_set():
            results.put((next(items), None))
    except BaseException as error:
        results.put((None, error))


def _read(source: Source, leading: tuple[int, ...], rows: np.ndarray, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Return the rows of one global batch that this process holds."""
    own = indices.reshape(leading)[..., rows]
    samples = [_arrays(source[int(index)]) for index in own.flat]
    return {
        name: np.stack([sample[name] for sample in samples]).reshape(*own.shape, *array.shape)
        for name, array in samples[0].items()
    }


def _uploaded(
    batches: Any, sharding: NamedSharding, leading: tuple[int, ...]
) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """Yield each batch on the devices, and the position in the data after it."""
    for local in batches:
        place = copy.deepcopy(batches.get_state())
        arrays = {
            name: jax.make_array_from_process_local_data(sharding, array, (*leading, *array.shape[len(leading) :]))
            for name, array in local.items()
        }
        yield arrays, place


def abstract_batch(
    source: Source, sharding: NamedSharding, *, batch_size: int, updates: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes, types and shardings of the batches of a Loader with the same arguments, and check them."""
    leading = _leading(source, sharding, batch_size, updates)
    return {
        name: jax.ShapeDtypeStruct((*leading, *array.shape), array.dtype, sharding=sharding)
        for name, array in _arrays(source[0]).items()
    }


def _leading(source: Source, sharding: NamedSharding, batch_size: int, updates: int | None) -> tuple[int, ...]:
    """Return the leading dimensions of batches, or raise InputError where source, mesh and batch do not fit."""
    if len(source) == 0:
        raise InputError('the data source is empty; generate samples or choose another one.')
    check_batch_size(batch_size, sharding.mesh)
    return (batch_size,) if updates is None else (updates, batch_size)


def check_batch_size(batch_size: int, mesh: Mesh | AbstractMesh) -> None:
    """Raise InputError unless a mesh divides the samples of a batch evenly."""
    groups = batch_groups(mesh)
    if batch_size < 1 or batch_size % groups:
        raise InputError(
            f'batch_size is {batch_size}, but data x fsdp of the mesh is {groups}; choose a multiple of {groups}.'
        )


def _arrays(sample: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays of a sample in device types: text is left out, 64-bit types become 32-bit ones."""
    arrays = {name: np.asarray(value) for name, value in sample.items()}
    return {
        name: array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
        for name, array in arrays.items()
        if array.dtype.kind not in 'OSU'
    }


def _local_rows(sharding: NamedSharding, leading: tuple[int, ...]) -> np.ndarray:
    """Return the indices along the batch axis, ascending, that the devices of this process hold."""
    rows = np.arange(leading[-1])
    slices = sharding.addressable_devices_indices_map(leading).values()
    return np.unique(np.concatenate([rows[index[-1]] for index in slices if index is not None]))
