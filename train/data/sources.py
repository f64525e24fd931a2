"""The `Source` protocol, and sources made of others: a part (held-out samples), one sample repeated (dry runs)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from neodragon_jax.base.errors import InputError

# Samples that a distillation holds out for its evaluation, unless its settings say otherwise.
EVALUATION_VIDEOS = 8


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
    """Some samples of a source, as a `Source`."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self._source, self._indices = source, indices

    @property
    def identity(self) -> str:
        """See `identity`."""
        inner, indices = identity(self._source), self._indices
        given = (indices.start, indices.stop) if isinstance(indices, range) else (list(indices),)
        return inner and joint_identity(inner, *given)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        return self._source[self._indices[index]]


class Repeated:
    """One sample, `count` times, as a `Source`."""

    def __init__(self, sample: Mapping[str, Any], count: int) -> None:
        self._sample, self._count = sample, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        return self._sample


def hold_out(source: Source, count: int, prompts: int = 0, setting: str = 'held_out') -> tuple[Part, Part]:
    """Return (the samples to train on, the last `count` samples).

    Args:
      prompts: number of prompts that the samples repeat in order; a prompt that is held out is in no sample to train
        on. 0 where samples do not repeat prompts.
      setting: the setting that `count` is from, with the folder of the samples, for the message.
    Raises:
      InputError: nothing would be left to train on, or less than half of the samples that are not held out.
    """
    left, held_out = held_out_indices(len(source), count, prompts)
    if count < 0 or not is_enough(left, held_out):
        of = f'{len(source)} with {prompts} prompts' if prompts else f'{len(source)}'
        remain = f', which leaves {len(left)} of other prompts to train on' if prompts and count >= 0 else ''
        more = 'make samples of more prompts' if prompts else 'add data'
        raise InputError(f'{setting}: {count} samples are to be held out of {of}{remain}; hold out fewer, or {more}.')
    if len(left) < held_out.start and jax.process_index() == 0:
        print(
            f'{setting}: besides the {count} samples held out, {held_out.start - len(left)} repeat their prompts; '
            f'{len(left)} of {len(source)} remain to train on.'
        )
    return Part(source, left), Part(source, held_out)


def held_out_indices(samples: int, count: int, prompts: int = 0) -> tuple[Sequence[int], range]:
    """Return the indices of the samples to train on, and of those that `hold_out` holds out of so many samples."""
    rest = range(max(samples - count, 0))
    held_out = range(len(rest), samples)
    if not held_out or not 0 < prompts < samples:
        return rest, held_out
    unseen = {index % prompts for index in held_out}
    return [index for index in rest if index % prompts not in unseen], held_out


def is_enough(left: Sequence[int], held_out: range) -> bool:
    """Return whether `hold_out` accepts what `held_out_indices` returned: most samples that are not held out remain."""
    return len(left) > 0 and 2 * len(left) >= held_out.start


def stacked(source: Source) -> dict[str, np.ndarray]:
    """Return all samples of a source as arrays with a leading axis; text is left out."""
    samples = [source[index] for index in range(len(source))]
    arrays = {name: np.stack([np.asarray(sample[name]) for sample in samples]) for name in samples[0]}
    return {name: array for name, array in arrays.items() if array.dtype.kind not in 'OSU'}
