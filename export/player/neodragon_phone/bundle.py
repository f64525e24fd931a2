"""A bundle on disk: files that the manifest names, inside the folder, of the right size and hash."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from neodragon_phone.chipsets import find_chipset
from neodragon_phone.errors import BundleError
from neodragon_phone.manifest import Manifest, read_manifest
from neodragon_phone.schema import REMEDY

_SAFE = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*')
PORTABLE = 'portable'


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
      folder: where it is.
      manifest: checked, see `manifest.read_manifest`.
      place: 'portable', or the chipset whose binaries are used.
      verified: files whose content has been checked; no other can be read.
    """

    folder: pathlib.Path
    manifest: Manifest
    place: str
    verified: frozenset[str]

    @classmethod
    def open(cls, folder: pathlib.Path, chipset: str | None = None) -> Bundle:
        """Read the manifest and check the content of every file that a run needs.

        Args:
          chipset: chipset of the binaries to run, by any of its names; None runs the portable graphs.
        Raises:
          BundleError: the manifest or a file is missing or damaged, a path leaves the bundle, or the bundle has no
            binaries for the chipset.
        """
        folder = pathlib.Path(folder)
        manifest = read_manifest(folder)
        place = PORTABLE if chipset is None else _place(folder, manifest, chipset)
        files = sorted(set(_needed(manifest, place)))
        for path in files:
            _verify(folder, manifest, path)
        return cls(folder, manifest, place, frozenset(files))

    def path(self, name: str) -> pathlib.Path:
        """Return the path of a verified file."""
        if name not in self.verified:
            raise BundleError(f'{name}: not a verified file of this bundle. {REMEDY}')
        return self.folder / name

    def table(self, name: str) -> np.ndarray:
        """Return a table, mapped into memory and read where it is used.

        Raises:
          BundleError: there is no such table.
        """
        entry = self.manifest['tables'].get(name)
        if entry is None:
            raise BundleError(f'manifest.json: there is no table {name[:80]!r}. {REMEDY}')
        return np.memmap(self.path(entry['file']), '<f4', 'r', shape=tuple(entry['shape']))

    def call(self, graph: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return inputs and outputs of a graph's recorded call."""
        entry = self.manifest['graphs'][graph]
        numbers = np.fromfile(self.path(entry['vector']['file']), '<f4')
        parts: list[dict[str, np.ndarray]] = []
        start = 0
        for tensors in (entry['inputs'], entry['outputs']):
            arrays = {}
            for name, tensor in tensors.items():
                stop = start + int(np.prod(tensor['shape'], dtype=np.int64))
                arrays[name] = numbers[start:stop].reshape(tensor['shape'])
                start = stop
            parts.append(arrays)
        return parts[0], parts[1]

    def recorded_latents(self) -> np.ndarray:
        """Return the latents of the recorded video, [T, h, w, C]."""
        entry = self.manifest['vectors']['video']['latents']
        return np.fromfile(self.path(entry['file']), '<f4').reshape(entry['shape'])


def _place(folder: pathlib.Path, manifest: Manifest, name: str) -> str:
    """Return the chipset of the bundle with a name; raise BundleError if there are no binaries for it."""
    chipset = find_chipset(manifest['chipsets'], name)
    if chipset is None or all(binary['chipset'] != chipset for binary in manifest['binaries']):
        known = ', '.join(manifest['chipsets']) or 'no chipset'
        raise BundleError(f'{folder}: has no binaries for {name!r}, only for {known}. Export for this chipset.')
    return chipset


def _needed(manifest: Manifest, place: str) -> Iterator[str]:
    """Yield the files of a run."""
    yield from (table['file'] for table in manifest['tables'].values())
    yield from (manifest['text'][name]['tokenizer'] for name in ('clip_l', 'clip_g', 'dt5'))
    if manifest['first_frame'] is not None:
        towers = manifest['first_frame']['towers']
        yield from (towers[name]['tokenizer'] for name in ('first_frame_clip_l', 'first_frame_clip_g'))
    yield from (graph['vector']['file'] for graph in manifest['graphs'].values())
    yield from (manifest['vectors']['video'][kind]['file'] for kind in ('latents', 'frames'))
    if place == PORTABLE:
        for graph in manifest['graphs'].values():
            yield from graph['portable']
    for binary in manifest['binaries']:
        if binary['chipset'] == place:
            yield binary['file']
            yield from (entry['wrapper'] for entry in binary['graphs'].values())


def _verify(folder: pathlib.Path, manifest: Manifest, name: str) -> None:
    """Raise BundleError unless a file is listed, lies in the bundle, and has the listed size and hash."""
    if not _SAFE.fullmatch(name) or any(part in ('.', '..') for part in name.split('/')):
        raise BundleError(f'manifest.json: {name[:80]!r} is not a path inside the bundle. {REMEDY}')
    entry = manifest['files'].get(name)
    if entry is None:
        raise BundleError(f'manifest.json: "files" does not list {name[:80]!r}. {REMEDY}')
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f'{name}: a link that leaves the bundle. {REMEDY}')
        if path.stat().st_size != entry['bytes']:
            raise BundleError(f'{name}: has {path.stat().st_size} bytes, not {entry["bytes"]}. {REMEDY}')
        with path.open('rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or 'not a path'
        raise BundleError(f'{name[:80]}: cannot be read ({reason}). {REMEDY}') from None
    if digest != entry['sha256']:
        raise BundleError(f'{name}: its content is damaged (SHA-256 differs). {REMEDY}')


def version_key(version: str) -> tuple[int, ...]:
    """Return the numbers of a dotted version for comparison, without any suffix."""
    return tuple(int(part) for part in re.findall(r'\d{1,9}', version.split('+')[0])[:4])
