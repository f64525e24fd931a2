"""Reader of the tensors in a .pth file of PyTorch, without PyTorch and without running code of the file.

A .pth file is a pickle of a dictionary of tensors, which refer to storages by key. In files of PyTorch 1.6 and newer,
pickle and storages are members of a zip archive; in older files they follow one another. Only the few names that such
a dictionary needs are resolved; any other name in the pickle is an error.

Source: torch/serialization.py of PyTorch, the functions `_legacy_load` and `_load`.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from neodragon_jax.base.atomic import PathLike
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.paths import input_path

# First pickle of an old file.
_MAGIC = 0x1950A86A20F9469CFC6C
_TYPES = {
    'FloatStorage': np.dtype('<f4'),
    'DoubleStorage': np.dtype('<f8'),
    'HalfStorage': np.dtype('<f2'),
    'LongStorage': np.dtype('<i8'),
    'IntStorage': np.dtype('<i4'),
}
# Errors of damaged files.
_DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, MemoryError),
    *(ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, AssertionError, ImportError),
)


class _Storage(NamedTuple):
    """A reference to the values of one or several tensors."""

    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    """A tensor before its values are read; offset and strides are in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def values(self, bytes_of: Mapping[str, bytes]) -> np.ndarray:
        """Return the values as a new array."""
        flat = np.frombuffer(bytes_of[self.storage.key], self.storage.dtype)
        last = self.offset + sum((side - 1) * step for side, step in zip(self.shape, self.strides, strict=True))
        if min(self.offset, *self.strides, *self.shape, last) < 0 or (0 not in self.shape and last >= len(flat)):
            raise ValueError('a tensor reaches beyond its storage')
        strides = [step * flat.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides).copy()


class _Unpickler(pickle.Unpickler):
    """Resolves tensors to `_Tensor`, and refuses every name that is not needed for them."""

    def find_class(self, module: str, name: str, /) -> Any:
        known: dict[tuple[str, str], Any] = {
            ('collections', 'OrderedDict'): collections.OrderedDict,
            ('torch._utils', '_rebuild_tensor_v2'): _tensor,
            ('torch._utils', '_rebuild_parameter'): lambda data, *_: data,
        }
        if module == 'torch' and name in _TYPES:
            return _TYPES[name]
        if (module, name) not in known:
            raise pickle.UnpicklingError(f'the file refers to {module}.{name}, which no weights need')
        return known[module, name]

    def persistent_load(self, pid: Any, /) -> Any:
        kind, dtype, key, *_ = pid
        if kind != 'storage':
            raise pickle.UnpicklingError(f'unknown reference {kind!r}')
        return _Storage(str(key), dtype)


def _tensor(storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def read_torch(path: PathLike, option: str) -> dict[str, np.ndarray]:
    """Return the tensors of a .pth file by name.

    Args:
      option: the option that names the file, for messages.
    Raises:
      InputError: the file is missing, damaged, or holds something else than named tensors.
    """
    file = input_path(path, option)
    if not file.is_file():
        raise InputError(f'{option} {path}: no such file.')
    return parse_torch(file.read_bytes(), f'{option} {path}')


def parse_torch(content: bytes, name: str) -> dict[str, np.ndarray]:
    """Return the tensors of the content of a .pth file.

    Args:
      name: of the file, for messages.
    Raises:
      InputError: the content is damaged, or holds something else than named tensors.
    """
    read: Callable[[bytes], tuple[Any, Mapping[str, bytes]]] = (
        _read_zip if zipfile.is_zipfile(io.BytesIO(content)) else _read_old
    )
    try:
        found, bytes_of = read(content)
        tensors = {key: value.values(bytes_of) for key, value in found.items() if isinstance(value, _Tensor)}
    except _DAMAGE as error:
        raise InputError(f'{name}: not readable weights of PyTorch ({error}); download the file again.') from error
    if not tensors:
        raise InputError(f'{name}: holds no named tensors; pass a file of weights, a state dict.')
    return tensors


def _read_zip(content: bytes) -> tuple[Any, Mapping[str, bytes]]:
    """Return the unpickled object, and the bytes of the storages, of a new file."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith('/data.pkl'))
        folder = pickled.removesuffix('data.pkl')
        if f'{folder}byteorder' in archive.namelist():
            _check_order(archive.read(f'{folder}byteorder') == b'little')
        root = f'{folder}data/'
        members = [name for name in archive.namelist() if name.startswith(root)]
        storages = {name.removeprefix(root): archive.read(name) for name in members}
        return _Unpickler(io.BytesIO(archive.read(pickled))).load(), storages


def _read_old(content: bytes) -> tuple[Any, Mapping[str, bytes]]:
    """Return the unpickled object, and the bytes of the storages, of an old file."""
    file = io.BytesIO(content)
    if _Unpickler(file).load() != _MAGIC:
        raise ValueError('no file of PyTorch')
    _Unpickler(file).load()  # version
    _check_order(_Unpickler(file).load()['little_endian'])
    reader = _Recorded(file)
    found = reader.load()
    storages = {}
    for key in _Unpickler(file).load():
        (count,) = struct.unpack('<q', file.read(8))
        storages[key] = file.read(count * reader.types[key].itemsize)
    return found, storages


def _check_order(little: bool) -> None:
    """Refuse a file of a big-endian machine, whose values would be misread."""
    if not little:
        raise ValueError('written on a big-endian machine')


class _Recorded(_Unpickler):
    """Also records the type of every storage, by key."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.types: dict[str, np.dtype] = {}

    def persistent_load(self, pid: Any, /) -> Any:
        storage = super().persistent_load(pid)
        self.types[storage.key] = storage.dtype
        return storage
