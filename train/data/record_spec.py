"""Specification of a dataset's records: named arrays of fixed shape, texts, and bytes.

Legend: T latent frames, H W latent grid, C channels, L text tokens, D text width, P pooled width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from pydantic import Field
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import checked, shown

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
FLOATS = DTYPES | {name: np.dtype(name) for name in ('float16', 'float64')}
ARRAY_DTYPES = FLOATS | {name: np.dtype(name) for name in ('uint8', 'int8', 'int32', 'int64')}
# Upper bound for a stored array, far above any real sample.
MOST_AXES, MOST_NUMBERS = 8, 2**32
# The writer adds it to every record.
INDEX = 'index'
# Names of text states in a record: those of T5 [L, E], and those that the denoiser reads [L, D].
T5_STATES, TEXT_STATES = 't5', 'text'


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and type of one array of a record."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ARRAY_DTYPES:
            raise InputError(f'dtype {self.dtype!r} cannot be stored; use one of {", ".join(ARRAY_DTYPES)}.')

    def conform(self, value: Any, where: str) -> np.ndarray:
        """Return an array in the stored type; floating-point numbers are rounded to it, integers must fit.

        Args:
          where: name of the array for error messages.
        Raises:
          InputError: the shape differs, or a number is not finite or out of range.
        """
        array, dtype = np.asarray(value), ARRAY_DTYPES[self.dtype]
        if array.shape != self.shape:
            raise InputError(f'{where} has shape {list(array.shape)}, the dataset {list(self.shape)}; pass that shape.')
        stored = array.astype(dtype)
        if self.dtype in FLOATS:
            if not np.isfinite(stored.astype(np.float64)).all():
                raise InputError(f'{where} is not finite in {dtype}; check the weights, or compute in float32.')
        elif array.dtype.kind not in 'biu' or (stored != array).any():
            raise InputError(f'{where} has values that {dtype} does not hold; pass integers in its range.')
        return stored


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSpec:
    """Fields of a record, without its index.

    Attributes:
      arrays: by name; they become batches.
      texts: names of texts. They stay on the host.
      blobs: names of byte strings, such as encoded clips. They stay on the host.
    """

    arrays: Mapping[str, ArraySpec]
    texts: tuple[str, ...] = ('prompt',)
    blobs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [*self.arrays, *self.texts, *self.blobs, INDEX]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(f'RecordSpec: {", ".join(twice)} is there twice ("{INDEX}" always is); rename it.')

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecordSpec) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.arrays)))

    @property
    def latents(self) -> tuple[int, ...]:
        """[T, H, W, C] of the records' latents.

        Raises:
          InputError: they hold none.
        """
        if 'latents' not in self.arrays:
            raise InputError(
                f'the samples hold {", ".join(self.names())}, but no latents; pass a folder of train.latents or '
                'train.teacher_samples.'
            )
        return self.arrays['latents'].shape

    def names(self) -> list[str]:
        """Return the names of a record's fields, without its index."""
        return [*self.arrays, *self.texts, *self.blobs]

    def features(self) -> tfds.features.FeaturesDict:
        """Return the TFDS features; raw bytes need no TensorFlow and are the fastest."""
        tensors = {
            name: tfds.features.Tensor(shape=array.shape, dtype=ARRAY_DTYPES[array.dtype], encoding='bytes')  # pyright: ignore[reportArgumentType]
            for name, array in self.arrays.items()
        }
        strings = {name: tfds.features.Text() for name in (*self.texts, *self.blobs)}
        index = {INDEX: tfds.features.Scalar(np.int64)}  # pyright: ignore[reportArgumentType]
        return tfds.features.FeaturesDict(tensors | strings | index)

    def serializer(self) -> Callable[[Mapping[str, Any]], bytes]:
        """Return the function from a record, conformed and with its index, to its bytes: a `tf.train.Example`.

        The fields are in the order of their names. That of TFDS leaves the order to chance, so that the hashes of two
        equal sets differ.
        """
        features = self.features()
        specs: Any = features.get_serialized_info()
        serializer = ExampleSerializer(specs)
        to_example = lambda record: serializer.get_tf_example(features.encode_example(record))
        return lambda record: to_example(record).SerializeToString(deterministic=True)

    def conform(self, name: str, value: Any, where: str) -> Any:
        """Return one array, text or byte string as it is stored; see `ArraySpec.conform`.

        Raises:
          InputError: it does not fit the dataset.
        """
        if name in self.arrays:
            return self.arrays[name].conform(value, f'{where}: {name}')
        if name in self.blobs:
            return bytes(value)
        try:
            return str(value).encode()
        except UnicodeEncodeError:
            raise InputError(f'{where}: {name} has half a surrogate pair, which is no text; remove it.') from None

    def to_json(self) -> dict[str, Any]:
        """Return the spec as a manifest stores it."""
        arrays = {name: {'shape': list(array.shape), 'dtype': array.dtype} for name, array in self.arrays.items()}
        return {'arrays': arrays, 'texts': list(self.texts), 'blobs': list(self.blobs)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], source: str) -> RecordSpec:
        """Invert `to_json`.

        Args:
          source: the file, for messages.
        Raises:
          InputError: a value is missing or wrong.
        """
        stored = checked(value, _StoredSpec, source)
        for name, array in stored.arrays.items():
            if array.dtype not in ARRAY_DTYPES:
                raise InputError(f'{source}: arrays.{name}.dtype is {shown(array.dtype)}. Copy the folder again.')
            if math.prod(array.shape) > MOST_NUMBERS:
                raise InputError(f'{source}: arrays.{name}.shape is {array.shape}, too large. Copy the folder again.')
        arrays = {name: ArraySpec(array.shape, array.dtype) for name, array in stored.arrays.items()}
        return cls(arrays, stored.texts, stored.blobs)


@dataclasses.dataclass(frozen=True)
class _StoredArray:
    """An array's spec as a manifest stores it."""

    shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(max_length=MOST_AXES)]
    dtype: str


@dataclasses.dataclass(frozen=True)
class _StoredSpec:
    """A record's spec as a manifest stores it."""

    arrays: dict[str, _StoredArray]
    texts: tuple[str, ...]
    blobs: tuple[str, ...]


class SampleSpec(RecordSpec):
    """The record of a teacher sample: latents and the conditioning of the prompt."""

    def __init__(
        self,
        latents: tuple[int, ...],
        text: tuple[int, ...],
        pooled: int,
        latents_dtype: str = 'bfloat16',
        text_dtype: str = 'float32',
        starts: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> None:
        """Build the spec of a teacher sample.

        Args:
          latents: [T, H, W, C] of the whole video.
          text: [L, D] of the prompt states; the mask has L numbers.
          pooled: P.
          latents_dtype, text_dtype: 'float32' or 'bfloat16'; `text_dtype` also applies to the pooled vector.
          starts: shapes of the starts of the teacher's stages by name, in the type of the latents.
        """
        for name, dtype in (('latents_dtype', latents_dtype), ('text_dtype', text_dtype)):
            if dtype not in DTYPES:
                raise InputError(f'SampleSpec.{name} is {dtype!r}; use one of {", ".join(DTYPES)}.')
        super().__init__(
            {
                'latents': ArraySpec(tuple(latents), latents_dtype),
                'text': ArraySpec(tuple(text), text_dtype),
                'text_mask': ArraySpec(tuple(text[:1]), 'int32'),
                'pooled': ArraySpec((pooled,), text_dtype),
            }
            | {name: ArraySpec(tuple(shape), latents_dtype) for name, shape in starts.items()}
        )

    @property
    def text(self) -> tuple[int, ...]:
        """[L, D] of the prompt states."""
        return self.arrays['text'].shape

    @property
    def pooled(self) -> int:
        """P."""
        return self.arrays['pooled'].shape[0]
