"""The `Source` protocol, and sources made of others: a part (held-out samples), one sample repeated (dry runs)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from neodragon_jax.base.errors import InputError


class Source(Protocol):
    """Random access to samples whose arrays have equal shapes. Texts and bytes stay on the host: batches omit them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def identity(source: Source) -> str:
    """Return a hash of the content of stored samples, '' for samples that are drawn from settings.

    A run and a resumed run must agree on it; copying or moving a sample set keeps it.
    """
    return getattr(source, 'identity', '')


def joint_identity(*parts: object) -> str:
    """Return the hash of a source that is made of others, from their identities and its own settings."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class Part:
    """The samples of a source from `start` to before `stop`, as a `Source`."""

    def __init__(self, source: Source, start: int, stop: int) -> None:
        self._source, self._range = source, range(len(source))[start:stop]

    @property
    def identity(self) -> str:
        """See `identity`."""
        inner = identity(self._source)
        return inner and joint_identity(inner, self._range.start, self._range.stop)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        return self._source[self._range[index]]


class Repeated:
    """One sample, `count` times, as a `Source`."""

    def __init__(self, sample: Mapping[str, Any], count: int) -> None:
        self._sample, self._count = sample, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        return self._sample


def hold_out(source: Source, count: int) -> tuple[Part, Part]:
    """Return (all samples but the last `count`, these).

    Raises:
      InputError: nothing would be left to train on.
    """
    if not 0 <= count < len(source):
        raise InputError(f'{count} samples are to be held out of {len(source)}; hold out fewer, or add data.')
    return Part(source, 0, len(source) - count), Part(source, len(source) - count, len(source))


def stacked(source: Source) -> dict[str, np.ndarray]:
    """Return all samples of a source as arrays with a leading axis; text is left out."""
    samples = [source[index] for index in range(len(source))]
    arrays = {name: np.stack([np.asarray(sample[name]) for sample in samples]) for name in samples[0]}
    return {name: array for name, array in arrays.items() if array.dtype.kind not in 'OSU'}
