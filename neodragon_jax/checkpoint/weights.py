"""Safetensors files of a component folder, validated by their headers before any tensor is read."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import is_there
from neodragon_jax.base.json_file import checked, read_json, shown
from neodragon_jax.checkpoint.names.text import T5_TIED_NAMES

WEIGHT_FILES = ('diffusion_pytorch_model.safetensors', 'model.safetensors')
# Each is a whole set of weights: one file, or the index of several.
_SETS = (*WEIGHT_FILES, *(f'{name}.index.json' for name in WEIGHT_FILES))

# Tensors that some files hold besides the parameters: a second name of a tied weight, and a constant 0, 1, 2, ... that
# old versions of transformers stored. They are not written back.
REDUNDANT = {
    *T5_TIED_NAMES,
    'text_model.embeddings.position_ids',
    'vision_model.vision_model.embeddings.position_ids',
}

# Types that parameters may have, as safetensors names them.
FLOATING = ('F16', 'BF16', 'F32', 'F64')
# The square of a larger number exceeds float32; trained parameters are smaller by many orders of magnitude.
LARGEST = 1e18
# Matrices that are zero until they are trained: those of the modulation, and the last layers of denoisers.
ZERO_AT_START = re.compile(r'(.*\.)?(norm1|norm1_context|norm_out)\.linear\.weight|proj_out\.weight')
# Share of a file in all-zero matrices beyond which it is damaged; a model may have parts that it does not use.
ZERO_SHARE = 0.1

_COPY = 'Copy the folder again.'
_OTHER_MODEL = f'Weights and config belong to different models; {_COPY[0].lower()}{_COPY[1:]}'


@dataclasses.dataclass(frozen=True)
class Header:
    """Place, shape and type of a stored tensor."""

    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class Weights:
    """The tensors of a component folder by their released names.

    Attributes:
      headers: place, shape and type of every tensor; the numbers are read on request.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Read the headers.

        Raises:
          InputError: a file is missing or damaged, the index names files outside the folder or disagrees with them, or
            two files hold the same tensor.
        """
        self._folder = folder
        self.headers: dict[str, Header] = {}
        for path, listed in _weight_files(folder).items():
            headers = _read_headers(path)
            if listed is not None and set(headers) != listed:
                name = min(set(headers) ^ listed)
                raise InputError(f'{path}: its tensors are not those in the index, such as {shown(name)}. {_COPY}')
            for name in sorted(set(headers) & set(self.headers)):
                raise InputError(f'{path}: tensor {shown(name)} is in {self.headers[name].path.name}, too. {_COPY}')
            self.headers |= headers
        # Second copies of a tensor, by the name of the first.
        self._copies: dict[str, Header] = {}
        for alias, name in T5_TIED_NAMES.items():
            if alias in self.headers and self.headers.setdefault(name, self.headers[alias]).name != alias:
                self._copies[name] = self.headers[alias]

    def check_names(self, expected: Iterable[str]) -> None:
        """Raise InputError unless the files hold exactly these tensors."""
        expected = list(expected)
        missing = [name for name in expected if name not in self.headers]
        unknown = sorted(set(self.headers) - set(expected) - REDUNDANT)
        for problem, names in (('is missing', missing), ('is not expected', unknown)):
            if names:
                name = names[0] if names[0].isprintable() else shown(names[0])
                more = f' (and {len(names) - 1} more)' if len(names) > 1 else ''
                raise InputError(
                    f'{self._folder}: tensor {name}{more} {problem} for the sizes in its config.json. {_OTHER_MODEL}'
                )

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise InputError unless the files hold exactly these tensors, with these shapes and floating types."""
        self.check_names(shapes)
        for name, shape in shapes.items():
            header = self.headers[name]
            if header.shape != tuple(shape):
                raise InputError(
                    f'{self._folder}: tensor {name} has shape {shown(header.shape)}; config.json asks for '
                    f'{list(shape)}. {_OTHER_MODEL}'
                )
            if header.dtype not in FLOATING:
                raise InputError(
                    f'{self._folder}: tensor {name} is of type {header.dtype}; supported: {", ".join(FLOATING)}. '
                    'Convert it, or copy the folder again.'
                )

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield tensors with their names, file by file.

        Raises:
          InputError: a number is not finite or exceeds LARGEST, more than ZERO_SHARE of a file is in matrices of zeros,
            a second copy of a tensor differs, or a file cannot be read.
        """
        by_path: dict[pathlib.Path, list[str]] = {}
        for name in names:
            by_path.setdefault(self.headers[name].path, []).append(name)
        for path, inside in by_path.items():
            zeros: dict[str, int] = {}
            with _opened(path) as file:
                for name in inside:
                    tensor = file.get_tensor(self.headers[name].name)
                    most = _check_numbers(path, name, tensor)
                    self._check_copy(name, tensor)
                    if tensor.ndim > 1 and most == 0 and not ZERO_AT_START.fullmatch(name):
                        zeros[name] = tensor.size
                    yield name, tensor
            if sum(zeros.values()) > ZERO_SHARE * sum(math.prod(self.headers[name].shape) for name in inside):
                raise InputError(
                    f'{path}: {len(zeros)} of {len(inside)} tensors are all zeros, as an interrupted download leaves '
                    f'them, such as {next(iter(zeros))}. Copy the file again.'
                )

    def _check_copy(self, name: str, tensor: np.ndarray) -> None:
        """Raise InputError if a file holds another tensor under the second name of this one."""
        copy = self._copies.get(name)
        if copy is None:
            return
        with _opened(copy.path) as file:
            same = np.array_equal(file.get_tensor(copy.name), tensor)
        if not same:
            raise InputError(
                f'{copy.path}: tensors {name} and {copy.name} are two names of one tensor, but differ. {_COPY}'
            )


def _check_numbers(path: pathlib.Path, name: str, tensor: np.ndarray) -> float:
    """Return the largest absolute value; raise InputError if it is not finite, or too large to compute with."""
    most = largest(tensor)
    if not math.isfinite(most):
        raise InputError(f'{path}: tensor {name} has values that are not finite. Copy the file again.')
    if most > LARGEST:
        raise InputError(f'{path}: tensor {name} has values of {most:.1e}, beyond {LARGEST:g}. Copy the file again.')
    return most


def largest(tensor: np.ndarray) -> float:
    """Return the largest absolute value of floating-point numbers, 0 if there are none; NaN counts as larger than all.

    It is read from the bits, whose order as whole numbers is that of absolute values: NumPy computes with numbers of 16
    bits one by one, which takes longer than reading them from a disk.
    """
    bits = tensor.view(f'u{tensor.itemsize}')
    signed = bits.view(f'i{tensor.itemsize}')
    # A number below zero is a negative whole number, and among those without a sign the largest.
    above, below = int(signed.max(initial=0)), int(bits.max(initial=0)) & np.iinfo(signed.dtype).max
    return float(np.asarray(max(above, below), bits.dtype).view(tensor.dtype))


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    """Open a safetensors file; its errors become InputError."""
    try:
        with safetensors.safe_open(path, framework='numpy') as file:
            yield file
    except (safetensors.SafetensorError, OSError, MemoryError) as error:
        reason = ' '.join(str(error).split())
        raise InputError(f'{path}: truncated or not a safetensors file ({reason}). Copy it again.') from None


def _read_headers(path: pathlib.Path) -> dict[str, Header]:
    """Return tensor name -> header of a file."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: Header(path, name, tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()
        }


def _weight_files(folder: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    """Return the safetensors files of a component; for indexed shards, also the tensors listed for each."""
    found = [name for name in _SETS if is_there(folder / name)]
    if len(found) > 1:
        raise InputError(
            f'{folder}: two sets of weights are in it, {found[0]} and {found[1]}. Remove the one that is not meant.'
        )
    if found:
        path = folder / found[0]
        return {path: None} if found[0] in WEIGHT_FILES else _shards(path)
    pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(('.pth', '.pth.tar', '.pt', '.bin')))
    if pickles:
        raise InputError(
            f'{folder}: {pickles[0]} is a PyTorch pickle, which can run code and is not read; save its state dict with '
            f'safetensors.torch.save_file as {WEIGHT_FILES[0]}.'
        )
    raise InputError(f'{folder}: no weights in it (looked for {" and ".join(WEIGHT_FILES)}). {_COPY}')


def remove_other_sets(folder: pathlib.Path, kept: str) -> None:
    """Remove the weight files and indexes of a component folder, except one."""
    for name in _SETS:
        if name != kept:
            (folder / name).unlink(missing_ok=True)


def _shards(index: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    """Return the shards of an index, with the tensors that it lists for each."""
    shards: dict[str, set[str]] = {}
    weight_map = checked(read_json(index, dict[str, Any]).get('weight_map'), dict[str, str], str(index), 'weight_map')
    for tensor, shard in weight_map.items():
        shards.setdefault(shard, set()).add(tensor)
    if not shards:
        raise InputError(f'{index}: its weight_map is empty. {_COPY}')
    for shard in sorted(shards):
        if pathlib.PurePath(shard).name != shard or '\\' in shard or not shard.endswith('.safetensors'):
            raise InputError(f'{index}: shard {shown(shard)} is not a safetensors file of this folder. {_COPY}')
        if not is_there(index.parent / shard):
            raise InputError(f'{index}: its shard {shard} is missing. {_COPY}')
    return {index.parent / shard: shards[shard] for shard in sorted(shards)}
