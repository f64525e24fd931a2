"""The contents of a bundle: graph and binary files, and the writer that records the hash of every file."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class GraphFiles:
    """One exported graph.

    Attributes:
      precision: precision of `onnx`, 'w8a16' or 'fp16'.
      onnx: portable file; its weights may be in other files of its folder.
      specs: `inputs` and `outputs`: shape, dtype and quantization of each tensor, by name.
      compared: names of the outputs that are compared with JAX.
      target_db: lowest signal-to-noise ratio of the compared outputs against JAX.
    """

    precision: str
    onnx: pathlib.Path
    specs: Mapping[str, Any]
    compared: tuple[str, ...]
    target_db: float


@dataclasses.dataclass(frozen=True)
class BinaryFiles:
    """One context binary for a chipset.

    Attributes:
      name: name of the model, such as `denoiser`.
      precision: precision of its graphs.
      chipset: name, such as 'sm8750'.
      wrappers: ONNX file that wraps each graph, by graph; all in the folder of the binary.
      provider_options: options of the QNN provider.
    """

    name: str
    precision: str
    chipset: str
    wrappers: Mapping[str, pathlib.Path]
    provider_options: Mapping[str, str]


class Draft:
    """Writes the files of a bundle and keeps their sizes and hashes.

    Attributes:
      folder: the bundle.
      files: `bytes` and `sha256` of every file, by its path in the bundle.
      tables: `file`, `dtype` and `shape` of every table, by name.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}
        self.tables: dict[str, dict[str, Any]] = {}
        self._of_content: dict[str, str] = {}

    def copy(self, source: pathlib.Path, path: str) -> str:
        """Copy a file to a path in the bundle; return the path."""
        target = self._parent(path)
        shutil.copyfile(source, target)
        return self._add(target, path)

    def link(self, source: pathlib.Path, path: str) -> str:
        """Add a file of the export at a path in the bundle, as a hard link where the disk has them; return the path.

        At full size a second copy of them would take most of the bundle's 22 GB.
        """
        target = self._parent(path)
        try:
            os.link(source, target)
        except OSError:  # another disk, or a file system without hard links
            shutil.copyfile(source, target)
        return self._add(target, path)

    def _add(self, target: pathlib.Path, path: str) -> str:
        target.chmod(0o644)
        with target.open('rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
        self.files[path] = {'bytes': target.stat().st_size, 'sha256': digest}
        return path

    def write(self, content: bytes, path: str) -> str:
        """Write bytes to a path in the bundle; return the path."""
        self._parent(path).write_bytes(content)
        self.files[path] = {'bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest()}
        return path

    def table(self, name: str, array: np.ndarray) -> str:
        """Write a table as plain little-endian numbers in row-major order; return its name. Equal tables share a file.

        Args:
          name: words joined by dots; unique in the bundle.
          array: floating-point numbers, written as float32.
        """
        content = np.ascontiguousarray(array, '<f4').tobytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._of_content:
            self._of_content[digest] = self.write(content, f'tables/{name}.bin')
        assert name not in self.tables, name
        self.tables[name] = {'file': self._of_content[digest], 'dtype': 'float32', 'shape': list(array.shape)}
        return name

    def _parent(self, path: str) -> pathlib.Path:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target
