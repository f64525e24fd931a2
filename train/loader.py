"""Batches on devices, in an order that depends on the seed alone.

The order is drawn once for the whole run; each process reads only the rows that its devices hold. So a run may resume
on another mesh or another number of processes, and still see the same batches in the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from neodragon_jax.errors import InputError
from train.data import Source
from train.sharding import BATCH_AXES

# Threads suffice for stored arrays: reading and copying them release the interpreter's lock.
READ_THREADS = 2
BATCHES_AHEAD = 2


class Loader:
    """Endless shuffled batches: [batch, ...] arrays, or [updates, batch, ...] of different samples.

    Every epoch has its own order, and batches run on from one epoch to the next, so no sample is left out.
    """

    def __init__(
        self, source: Source, sharding: NamedSharding, *, batch_size: int, updates: int | None = None, seed: int = 0
    ) -> None:
        """Begin at the first batch.

        Args:
          sharding: of the batches, from `train.sharding.batch_sharding`; its axis is 1 where there are updates.
          batch_size: samples in a batch over all devices and processes.
          updates: batches stacked in front, for programs that make several updates in one step.
        Raises:
          InputError: there are no samples, or the mesh does not divide the batch.
        """
        self._source, self._sharding = source, sharding
        self._leading = _leading(source, sharding, batch_size, updates)
        self._rows = _local_rows(sharding, self._leading)
        order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().batch(math.prod(self._leading))
        options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD)
        self._batches = iter(order.map(self._read).to_iter_dataset(options))

    def _read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows of one global batch that this process holds."""
        own = indices.reshape(self._leading)[..., self._rows]
        samples = [_arrays(self._source[int(index)]) for index in own.flat]
        return {
            name: np.stack([sample[name] for sample in samples]).reshape(*own.shape, *array.shape)
            for name, array in samples[0].items()
        }

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        local, rows = next(self._batches), len(self._leading)
        return {
            name: jax.make_array_from_process_local_data(self._sharding, array, (*self._leading, *array.shape[rows:]))
            for name, array in local.items()
        }

    def get_state(self) -> dict[str, Any]:
        """Return JSON that makes `set_state` go on after the batch that was returned last; equal on every process."""
        return self._batches.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `get_state` was called."""
        self._batches.set_state(dict(state))

    def close(self) -> None:
        """Stop reading ahead."""
        self._batches.close()


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
    groups = math.prod(sharding.mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size < 1 or batch_size % groups:
        raise InputError(
            f'batch_size is {batch_size}, but data x fsdp of the mesh is {groups}; choose a multiple of {groups}.'
        )
    return (batch_size,) if updates is None else (updates, batch_size)


def _arrays(sample: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return what of a sample goes to the devices, in types that devices have (no text, no 64 bits)."""
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
