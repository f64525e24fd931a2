"""Copies of files on a phone: the files that the runner reads, and a folder that holds these and no others."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from export.phone.adb import Phone
from neodragon_jax.base.errors import InputError

CPU = 'cpu'
# A command line of adb is short on old phones.
_PATHS_PER_COMMAND = 50


@dataclasses.dataclass(frozen=True)
class Copy:
    """A file to copy: where it is, and its SHA-256."""

    source: pathlib.Path
    sha256: str


def runner_graphs(manifest: Mapping[str, Any]) -> list[str]:
    """Return the graphs that the runner of export/player/cpp runs: all, of each at least the recorded call."""
    return [graph for phase in manifest['phases'] for graph in phase['graphs']]


def runner_files(manifest: Mapping[str, Any], chipset: str) -> list[str]:
    """Return the files of a bundle that the runner reads, manifest.json excepted.

    Args:
      chipset: chipset of the binaries to run; CPU runs the portable graphs.
    """
    names = runner_graphs(manifest)
    files = [manifest['graphs'][name]['vector']['file'] for name in names]
    files += [manifest['tables'][table]['file'] for table in _tables(manifest)]
    if chipset == CPU:
        files += [file for name in names for file in manifest['graphs'][name]['portable']]
    for binary in manifest['binaries']:
        wrappers = [entry['wrapper'] for name, entry in binary['graphs'].items() if name in names]
        if binary['chipset'] == chipset and wrappers:
            files += [binary['file'], *wrappers]
    return sorted(set(files))


def _tables(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tables of the denoiser and of the recorded video's prompt."""
    for stage in manifest['denoiser']['stages']:
        yield from (step['sinusoid'] for kind in ('first_unit_steps', 'steps') for step in stage[kind])
        for unit in filter(None, stage['units']):  # null for a first frame that is given
            yield from (entry[key] for entry in unit.values() for key in ('table', 'padded') if key in entry)
    yield from filter(None, manifest['vectors']['video']['prompt_tables'].values())


def synchronize(phone: Phone, folder: str, copies: Mapping[str, Copy], report: Callable[[str], object]) -> None:
    """Make a folder of a phone hold given files and no others; equal files that are there are not copied again.

    Args:
      copies: by path in the folder.
      report: takes a line before each group of files is copied.
    Raises:
      InputError: adb fails, or a file arrives damaged.
    """
    phone.shell('mkdir', '-p', folder)
    there = {path.removeprefix('./') for path in phone.script(f'cd {folder} && find . ! -type d').splitlines()}
    _on_each(phone, folder, ['rm', '-f'], sorted(there - copies.keys()))
    digests = _digests(phone, folder, sorted(there & copies.keys()))
    missing = [path for path, copy in copies.items() if digests.get(path) != copy.sha256]
    _on_each(phone, folder, ['mkdir', '-p'], sorted({str(pathlib.PurePosixPath(path).parent) for path in missing}))
    for group, paths in _groups(missing).items():
        size = sum(copies[path].source.stat().st_size for path in paths)
        report(f'push {group}: files {len(paths)}, {size / 1e6:,.1f} MB')
        for path in paths:
            phone.push(copies[path].source, f'{folder}/{path}')
    digests = _digests(phone, folder, missing)
    for path in missing:
        if digests.get(path) != copies[path].sha256:
            raise InputError(f'{phone.serial}: {path} arrived damaged. Check the cable and run again.')


def _groups(paths: Sequence[str]) -> dict[str, list[str]]:
    """Return paths by the part of the bundle that they belong to, or the runtime."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault('/'.join(path.split('/')[:-1][:2]) or 'runtime', []).append(path)
    return groups


def _digests(phone: Phone, folder: str, paths: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of files in a folder of the phone by path."""
    lines = (line.split(maxsplit=1) for line in _on_each(phone, folder, ['sha256sum'], paths))
    return {path: digest for digest, path in lines}


def _on_each(phone: Phone, folder: str, command: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Run a command on paths in a folder of the phone; return the lines of its output."""
    batches = (paths[start : start + _PATHS_PER_COMMAND] for start in range(0, len(paths), _PATHS_PER_COMMAND))
    scripts = [f'cd {folder} && {shlex.join([*command, *batch])}' for batch in batches]
    return [line for script in scripts for line in phone.script(script).splitlines()]
