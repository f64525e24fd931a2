"""Mixture of several sources in given shares, such as pictures and videos; and caption dropout.

    shapes, stills = SampleSource('LATENTS/320x512'), SampleSource('STILLS/320x512')
    source = Mixture([shapes, stills], weights=[3, 1], seed=0)

Legend: B batch, T latent frames, L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from neodragon_jax.base.errors import InputError
from train.data.record_spec import INDEX, ArraySpec, RecordSpec
from train.data.sample_source import SampleSource
from train.data.sources import Source, identity, joint_identity

LATENTS, UNITS, ORIGIN = 'latents', 'units', 'source'


class Mixture:
    """Samples of several sources, each source with its share, as a `Source`.

    Sources have arrays of the same names, shapes and types; only the number of latent frames may differ: shorter ones
    are padded with zeros at the end, and `units` is the number of valid latents (1 for a picture). A sample holds
    the number of its `source`, and its `index` in the mixture.

    One round of the mixture shows all samples of every source: it has the smallest length at which each source has its
    share and no sample is left out. Sources that are small for their share are shown several times, each time whole
    except for the last, which shows a part that depends on the seed. The loader shuffles the order within a round.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int = 0) -> None:
        """Lay out a round.

        Args:
          weights: positive; only their proportions count.
          seed: selects the samples that are shown once more than the others.
        Raises:
          InputError: a weight is not positive, a source is empty, or the sources are incompatible.
        """
        if not sources or len(sources) != len(weights):
            raise InputError(f'mixture: {len(sources)} sources and {len(weights)} weights; give one weight per source.')
        if not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise InputError(f'mixture: weights are {list(weights)}; give positive numbers.')
        if not all(len(source) for source in sources):
            raise InputError('mixture: a source is empty; leave it out.')
        self._sources, self._weights, self._seed = list(sources), [float(weight) for weight in weights], seed
        self._arrays = [_arrays(source) for source in sources]
        self._latents = _common_latents(self._arrays)
        # `units` may be added to sources that have none.
        comparable = [
            {name: array for name, array in arrays.items() if name not in (LATENTS, UNITS)} for arrays in self._arrays
        ]
        _check_equal(comparable)
        rounds = max(len(source) / weight for source, weight in zip(sources, self._weights, strict=True))
        # Rounding error may turn a share of 12 into 12.000000001.
        self._counts = [math.ceil(round(rounds * weight, 6)) for weight in self._weights]
        self._ends = list(itertools.accumulate(self._counts))
        # The samples of each source's last, partial showing.
        self._again = [
            np.random.default_rng((seed, number)).permutation(len(source))[: count % len(source)]
            for number, (source, count) in enumerate(zip(sources, self._counts, strict=True))
        ]

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def counts(self) -> list[int]:
        """Samples of each source in a round."""
        return list(self._counts)

    def origin(self, index: int) -> tuple[int, int]:
        """Return the number of the source of a sample, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        size = len(self._sources[number])
        rounds, place = divmod(index - self._ends[number] + self._counts[number], size)
        if rounds == self._counts[number] // size:  # the last, partial showing
            place = int(self._again[number][place])
        return number, place

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        number, place = self.origin(index)
        sample = dict(self._sources[number][place])
        if self._latents is not None:
            latents = np.asarray(sample[LATENTS])
            padding = self._latents[0] - len(latents)
            sample[UNITS] = np.int32(sample.get(UNITS, len(latents)))
            if padding:
                sample[LATENTS] = np.pad(latents, [(0, padding), *[(0, 0)] * (latents.ndim - 1)])
        return sample | {INDEX: index, ORIGIN: np.int32(number)}

    @property
    def spec(self) -> RecordSpec:
        """Names, shapes and types of the mixture's arrays; texts are not part of it."""
        arrays = dict(self._arrays[0]) | {ORIGIN: ArraySpec((), 'int32')}
        if self._latents is not None:
            arrays[LATENTS] = ArraySpec(self._latents, arrays[LATENTS].dtype)
            arrays[UNITS] = ArraySpec((), 'int32')
        return RecordSpec(arrays, texts=())

    @property
    def protocol(self) -> dict[str, Any]:
        """The settings that are equal in the protocols of all sources."""
        first, *others = [getattr(source, 'protocol', {}) for source in self._sources]
        return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}

    def negative(self) -> dict[str, np.ndarray]:
        """Return the negative conditioning; it must be the same in all sources."""
        return self._shared('negative')

    def null(self) -> dict[str, np.ndarray]:
        """Return the conditioning of the empty prompt; it must be the same in all sources."""
        return self._shared('null')

    def _shared(self, kind: str) -> dict[str, np.ndarray]:
        """Return a conditioning of all sources; raise InputError where two differ."""
        first, *others = [getattr(source, kind)() for source in self._sources]
        for other in others:
            if first.keys() != other.keys() or any((first[name] != other[name]).any() for name in first):
                raise InputError(
                    f'mixture: the sources have different {kind} conditionings; make them with one checkpoint and the '
                    'same settings.'
                )
        return first

    @property
    def identity(self) -> str:
        """Hash of the content of all sources, see `train.data.sources.identity`; '' if one has none."""
        inner = [identity(source) for source in self._sources]
        return joint_identity(inner, self._weights, self._seed) if all(inner) else ''

    def metadata(self) -> dict[str, Any]:
        """Return JSON that is equal for mixtures of the same samples."""
        protocols = [[len(source), getattr(source, 'protocol', {})] for source in self._sources]
        digest = hashlib.sha256(json.dumps(protocols, sort_keys=True).encode()).hexdigest()[:16]
        return {'weights': self._weights, 'seed': self._seed, 'sources': digest}


def _arrays(source: Source) -> dict[str, ArraySpec]:
    """Return the arrays of a source except its index."""
    if isinstance(source, SampleSource | Mixture):
        return dict(source.spec.arrays)
    arrays = {name: np.asarray(value) for name, value in source[0].items() if name != INDEX}
    return {
        name: ArraySpec(array.shape, str(array.dtype))
        for name, array in arrays.items()
        if array.dtype.kind not in 'OSU'
    }


def _common_latents(sources: Sequence[Mapping[str, ArraySpec]]) -> tuple[int, ...] | None:
    """Return [T, H, W, C] with the largest T, or None if no source has latents."""
    given = [arrays[LATENTS] for arrays in sources if LATENTS in arrays]
    if not given:
        return None
    if len(given) < len(sources) or len({(array.shape[1:], array.dtype) for array in given}) > 1:
        shapes = ', '.join(_name(arrays.get(LATENTS)) for arrays in sources)
        raise InputError(f'mixture: latents are {shapes}; mix sources that differ in their number of frames only.')
    return max((array.shape for array in given), key=lambda shape: shape[0])


def _check_equal(sources: Sequence[Mapping[str, ArraySpec]]) -> None:
    """Raise InputError unless all sources have the same arrays."""
    for number, arrays in enumerate(sources):
        for name in sorted({*sources[0], *arrays}):
            if sources[0].get(name) != arrays.get(name):
                first, other = _name(sources[0].get(name)), _name(arrays.get(name))
                raise InputError(
                    f'mixture: {name} is {first} in source 0, {other} in source {number}; mix sources that were made '
                    'with the same settings.'
                )


def _name(array: ArraySpec | None) -> str:
    return 'absent' if array is None else f'{array.dtype} {list(array.shape)}'


def drop_captions(
    key: PRNGKeyArray, batch: Mapping[str, Array], null: Mapping[str, Any], probability: float
) -> dict[str, Array]:
    """Return a batch in which each caption's whole conditioning is replaced by the empty prompt's with a probability.

    Pure, for use inside a training step. Arrays that `null` does not name are unchanged.

    Args:
      batch: arrays [B, ...], or [N, B, ...].
      null: `SampleSource.null`, the conditioning of the empty prompt, such as text [L, D], text_mask [L], pooled [P].
    """
    name = next(iter(null))
    leading = batch[name].shape[: batch[name].ndim - jnp.ndim(null[name])]
    dropped = jax.random.bernoulli(key, probability, leading)

    def replace(array: Array, empty: Any) -> Array:
        chosen = dropped.reshape(leading + (1,) * jnp.ndim(empty))
        return jnp.where(chosen, jnp.asarray(empty).astype(array.dtype), array)

    return dict(batch) | {name: replace(batch[name], empty) for name, empty in null.items()}
