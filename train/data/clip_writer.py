"""Writer of clips, cut from inspected videos and stored with their captions: one sample set per size.

A set whose videos have changed is rewritten beside the old one and then replaces it. Unchanged clips are copied without
decoding. The result equals that of a first run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.progress import ProgressBar
from train.data import mp4_bytes
from train.data.captions import Captions, readable
from train.data.clip_source import CLIP_SPEC
from train.data.inspection import Criteria, Verdict
from train.data.manifest import is_sample_set, read_manifest
from train.data.parallel import ordered_map
from train.data.sample_source import SampleSource
from train.data.sample_writer import SampleWriter
from train.data.video_files import FPS, Unusable, read_clips

NAME = 'captioned_clips'
# Beside a set: one line per clip with its file, the file's size and modification time, and the frame indices.
ORIGINS = 'origins.jsonl'


@dataclasses.dataclass(frozen=True)
class ClipOptions:
    """Options of cutting and storing clips.

    Attributes:
      videos: folder of the videos.
      out: folder of the sets, one per size.
      quality: x264's constant quality, 0 to 51.
      workers: threads.
    """

    videos: pathlib.Path
    out: pathlib.Path
    criteria: Criteria
    quality: int
    samples_per_shard: int
    workers: int


class Unreadable(Exception):
    """Error for an unchanged file that could be inspected, but whose clips cannot be cut.

    Attributes:
      verdict: of the inspection.
      reason: for leaving the file out.
    """

    def __init__(self, verdict: Verdict, reason: str) -> None:
        super().__init__(f'{readable(verdict.file)}: {reason}')
        self.verdict, self.reason = verdict, reason


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip to store: the `number`-th of a file."""

    index: int
    verdict: Verdict
    number: int

    @property
    def origin(self) -> str:
        """Return a line of JSON that is equal for equal pixels."""
        verdict = self.verdict
        return json.dumps([verdict.file, verdict.bytes, verdict.changed_ns, verdict.clips[self.number]])


def size_name(size: tuple[int, int]) -> str:
    """Return the folder name of a size's set."""
    return f'{size[0]}x{size[1]}'


def write_clips(options: ClipOptions, size: tuple[int, int], verdicts: Sequence[Verdict], captions: Captions) -> int:
    """Write the missing clips of one size; return the number of clips in its set.

    Raises:
      InputError: the folder holds a set with other settings, or a file has changed since its inspection.
      OSError: the system cannot read a file, which may be good.
      Unreadable: a file must be left out. What is written by then is kept only if the set was complete before.
    """
    numbered = ((verdict, number) for verdict in verdicts for number in range(len(verdict.clips)))
    clips = [Clip(index, verdict, number) for index, (verdict, number) in enumerate(numbered)]
    content = [[readable(verdict.file), captions.of(verdict.file), verdict.clips] for verdict in verdicts]
    criteria = options.criteria
    protocol = {
        'frames': criteria.frames, 'fps': FPS, 'height': size[0], 'width': size[1], 'quality': options.quality,
        'clips_per_video': criteria.clips, 'min_fps': criteria.min_fps,
        'clips': hashlib.sha256(repr(content).encode()).hexdigest()[:16],
    }  # fmt: skip
    folder = options.out / size_name(size)
    with_changes = folder.with_name(f'.next-{folder.name}')
    if _has_changed(with_changes, protocol):  # left by a run that was stopped before the latest changes
        shutil.rmtree(with_changes)
    if with_changes.exists() or _has_changed(folder, protocol):
        _write(options, with_changes, protocol, clips, captions, _stored_clips(folder))
        _replace(folder, with_changes)
    else:
        _write(options, folder, protocol, clips, captions, {})
    return len(clips)


def _has_changed(folder: pathlib.Path, protocol: Mapping[str, Any]) -> bool:
    """Return whether a folder holds a set of other clips with the same settings."""
    if not is_sample_set(folder):
        return False
    # Older versions did not record all settings.
    old = {**protocol, **read_manifest(folder).protocol}
    return old['clips'] != protocol['clips'] and {**old, 'clips': ''} == {**protocol, 'clips': ''}


def _stored_clips(folder: pathlib.Path) -> dict[str, tuple[SampleSource, int]]:
    """Return origin -> place of every clip of a complete set."""
    try:
        source = SampleSource(folder)
        origins = (folder / ORIGINS).read_text().splitlines()
    except (InputError, FileNotFoundError, ValueError):
        return {}
    return {line: (source, index) for index, line in enumerate(origins)} if len(origins) == len(source) else {}


def _replace(folder: pathlib.Path, new: pathlib.Path) -> None:
    """Replace a set by a complete one; if this process is killed in between, the next run finishes the replacement."""
    old = folder.with_name(f'.old-{folder.name}')
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _write(
    options: ClipOptions,
    folder: pathlib.Path,
    protocol: Mapping[str, Any],
    clips: Sequence[Clip],
    captions: Captions,
    stored: Mapping[str, tuple[SampleSource, int]],
) -> None:
    """Write the missing clips of a set, copying those that are stored elsewhere."""
    with SampleWriter(
        folder,
        CLIP_SPEC,
        len(clips),
        protocol=protocol,
        samples_per_shard=options.samples_per_shard,
        name=NAME,
    ) as writer:
        with atomic_file(folder / ORIGINS) as path:
            path.write_text(''.join(f'{clip.origin}\n' for clip in clips))
        todo = [clips[index] for index in writer.missing()]
        by_file = [list(group) for _, group in itertools.groupby(todo, key=lambda clip: clip.verdict.file)]
        make = lambda group: list(_records(options, group, captions, stored))
        with ProgressBar(total=len(todo), unit='clip', desc=folder.name) as bar:
            for records in ordered_map(make, by_file, options.workers):
                for record in records:
                    writer.append(record)
                bar.update(len(records))


def _records(
    options: ClipOptions, clips: Sequence[Clip], captions: Captions, stored: Mapping[str, tuple[SampleSource, int]]
) -> Iterator[Mapping[str, Any]]:
    """Yield the records of clips of one file."""
    verdict = clips[0].verdict
    new = [clip for clip in clips if clip.origin not in stored]
    encoded = dict(zip((clip.index for clip in new), _encoded(options, new), strict=True))
    for clip in clips:
        if clip.index not in encoded:
            source, place = stored[clip.origin]
            encoded[clip.index] = source[place]['video']
        yield {
            'index': clip.index,
            'prompt': captions.of(verdict.file),
            'file': readable(verdict.file),
            'start': verdict.starts[clip.number],
            'video': encoded[clip.index],
        }


def _encoded(options: ClipOptions, clips: Sequence[Clip]) -> Iterator[bytes]:
    """Yield clips of one file as mp4."""
    if not clips:
        return
    verdict = clips[0].verdict
    assert verdict.size is not None
    try:
        cut = read_clips(options.videos / verdict.file, [verdict.clips[clip.number] for clip in clips], verdict.size)
    except Unusable as problem:
        if verdict.is_current(options.videos):
            raise Unreadable(verdict, str(problem)) from None
        raise InputError(
            f'{readable(verdict.file)} has changed since it was inspected: {problem}. Run the same command again: it '
            'inspects changed files.'
        ) from None
    yield from (mp4_bytes.encode(frames, FPS, options.quality) for frames in cut)
