"""The calibration set on disk: one folder per generated video, and the protocol of the recording.

There are three kinds of videos, of disjoint prompts: calibration, validation and evaluation.

The folder of a video is created when the video is complete, so that an interrupted recording resumes. Its `record.json`
holds the sizes and hashes of its files; a damaged video is recorded again. A set is reused for the same protocol and
rejected for any other.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from export.host.file_records import damage, file_records, read_json
from export.host.protocol import KEPT, VALIDATION, VIDEOS, Protocol
from export.host.recording import (
    EVALUATION_CALLS,
    Call,
    Recording,
    Sample,
    Scenes,
    Video,
    flatten,
    rotating,
    spread,
    unflatten,
)
from export.measure.resources import Resources, measured
from neodragon_jax.base import json_file
from neodragon_jax.base.atomic import atomic_file, atomic_folder
from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.sampler import Prompt

_PROTOCOL, _RECORD = 'protocol.json', 'record.json'
_CALIBRATION, _VALIDATION, _EVALUATION = 'calibration', 'validation', 'evaluation'


@dataclasses.dataclass(frozen=True)
class CalibrationSet:
    """A recorded calibration set, with the validation and evaluation videos.

    Attributes:
      folder: where the set is stored.
      protocol: prompts, weights and settings of the recording.
    """

    folder: pathlib.Path
    protocol: Protocol

    @classmethod
    def open(cls, folder: pathlib.Path, protocol: Protocol) -> CalibrationSet:
        """Return the set of a folder, with the protocol that it was recorded by; `record` completes its videos.

        Raises:
          InputError: the folder holds a set of another protocol, or its protocol is damaged.
        """
        found = cls(folder, protocol)
        return dataclasses.replace(found, protocol=found._check_or_write_protocol())

    @property
    def videos(self) -> int:
        """Number of videos of all kinds."""
        return len(self._videos())

    def record(self, open_recording: Callable[[], Recording], on_video: Callable[[str], None]) -> None:
        """Generate the videos that are missing or damaged.

        Args:
          open_recording: loads the program; called only if a video has to be generated.
          on_video: called with one line per video, also for those recorded before.
        """
        recording = None
        for kind, number in self._videos():
            name = f'{kind} video {number + 1} of {self._count(kind)}'
            harm = self._damage(kind, number)
            if harm == '':
                on_video(f'{name}: recorded before')
                continue
            with measured() as resources:
                recording = recording or open_recording()
                video, calls = recording.generate(self._scenes(kind), number)
            self._write(kind, number, video, calls, resources)
            on_video(f'{name}: recorded' + (f' again, because {harm}' if harm else ''))

    @property
    def sha256(self) -> str:
        """SHA-256 of the protocol, which determines the content."""
        return self.protocol.sha256

    @property
    def resources(self) -> list[Resources]:
        """Time and memory of recording each video."""
        return [
            json_file.read_json(self._folder(*video) / _RECORD, dict[str, Any])['resources'] for video in self._videos()
        ]

    def calls(self, name: str, count: int) -> Iterator[Any]:
        """Yield up to `count` calibration calls of a graph, as `Call` or `Sample`, read one by one."""
        entries = [(number, i) for number in range(self.protocol.videos) for i in range(self.protocol.keep[name])]
        for number, index in spread(entries, count):
            yield self._read(_CALIBRATION, number, name, index)

    def validation(self, name: str, count: int) -> dict[str, list[Any]]:
        """Return up to `count` calls of a graph for each validation prompt."""
        return self._held_out(_VALIDATION, name, count)

    def evaluation(self, name: str, count: int) -> dict[str, list[Any]]:
        """Return up to `count` calls of a graph for each evaluation prompt."""
        return self._held_out(_EVALUATION, name, count)

    def _held_out(self, kind: str, name: str, count: int) -> dict[str, list[Any]]:
        calls = {}
        for number, prompt in enumerate(self._scenes(kind).prompts):
            with np.load(self._folder(kind, number) / f'{name}.npz') as arrays:
                kept = len({key.partition('|')[0] for key in arrays})
            calls[prompt] = [self._read(kind, number, name, index) for index in spread(range(kept), count)]
        return calls

    def video(self, number: int) -> Video:
        """Return the video of an evaluation prompt."""
        return self._read_video(_EVALUATION, number)

    def validation_video(self, number: int) -> Video:
        """Return the video of a validation prompt."""
        return self._read_video(_VALIDATION, number)

    def _read_video(self, kind: str, number: int) -> Video:
        with np.load(self._folder(kind, number) / 'video.npz') as arrays:
            prompts = [
                Prompt(*(arrays[f'{kind}.{field}'] for field in Prompt._fields)) if f'{kind}.text' in arrays else None
                for kind in ('prompt', 'negative')
            ]
            others = [arrays.get(name) for name in ('first_frame', 'latents', 'frames')]
        return Video(*prompts, *others)  # pyright: ignore[reportArgumentType]

    def _videos(self) -> list[tuple[str, int]]:
        kinds = (_EVALUATION, _VALIDATION, _CALIBRATION)
        return [(kind, number) for kind in kinds for number in range(self._count(kind))]

    def _count(self, kind: str) -> int:
        return self.protocol.videos if kind == _CALIBRATION else len(self._scenes(kind).prompts)

    def _scenes(self, kind: str) -> Scenes:
        scenes = {
            _CALIBRATION: self.protocol.scenes,
            _VALIDATION: self.protocol.validation,
            _EVALUATION: self.protocol.evaluation,
        }
        return scenes[kind]

    def _folder(self, kind: str, number: int) -> pathlib.Path:
        return self.folder / f'{kind}-{number:05d}'

    def _damage(self, kind: str, number: int) -> str | None:
        """Return '' for a complete video, None for a missing one, or a phrase that describes the damage."""
        folder = self._folder(kind, number)
        if not folder.is_dir():
            return None
        record = read_json(folder / _RECORD)
        if record is None:
            return f'{folder / _RECORD} is missing or damaged'
        return damage(folder, record.get('files')) or ''

    def _read(self, kind: str, number: int, name: str, index: int) -> Call | Sample:
        prefix = f'{index}|'
        with np.load(self._folder(kind, number) / f'{name}.npz') as arrays:
            return unflatten({key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)})

    def _write(
        self, kind: str, number: int, video: Video, calls: Mapping[str, Sequence[Any]], resources: Resources
    ) -> None:
        """Write the kept calls of a video; for a validation or evaluation video, also its latents and frames."""
        # Shift by one per pass over the prompts, so that every prompt covers all units and steps.
        turn = number + number // len(self.protocol.scenes.prompts)
        with atomic_folder(self._folder(kind, number), replace=True) as draft:
            for name, keep in self.protocol.keep.items():
                calibrates = kind == _CALIBRATION
                kept = rotating(calls[name], keep, turn) if calibrates else spread(calls[name], EVALUATION_CALLS)
                arrays = {f'{i}|{path}': array for i, call in enumerate(kept) for path, array in flatten(call).items()}
                np.savez(draft / f'{name}.npz', **arrays)  # pyright: ignore[reportArgumentType]
            if kind != _CALIBRATION:
                np.savez(draft / 'video.npz', **flatten(video))  # pyright: ignore[reportArgumentType]
            record = {'resources': resources, 'files': file_records(draft)}
            (draft / _RECORD).write_text(json.dumps(record, indent=2) + '\n')

    def _check_or_write_protocol(self) -> Protocol:
        """Return the protocol of the set in the folder, or write this one if there is none.

        A complete set with more calls or graphs than this protocol requires is also accepted.

        Raises:
          InputError: the folder holds a set of another protocol, or its protocol is damaged.
        """
        path = self.folder / _PROTOCOL
        if not path.is_file():
            with atomic_file(path) as draft:
                draft.write_text(json.dumps(self.protocol.to_json(), indent=2) + '\n')
            return self.protocol
        found = read_json(path)
        if found is None or not {KEPT, VIDEOS} <= set(found):
            raise InputError(f'{path}: damaged. Remove {self.folder} to record the calibration set again.')
        return self._agreed(found)

    def _agreed(self, found: Mapping[str, Any]) -> Protocol:
        """Return this protocol with the calls and videos of the set in the folder.

        Raises:
          InputError: the set has another protocol, or fewer calls.
        """
        wanted = self.protocol.to_json()
        if self._has_enough(found):
            wanted |= {key: found[key] for key in (KEPT, VIDEOS)}
            # Without quantized graphs no validation videos are asked for; those in the folder do no harm.
            wanted[VALIDATION] = wanted[VALIDATION] or found.get(VALIDATION)
        different = sorted(key for key in {**wanted, **found} if found.get(key) != wanted.get(key))
        if different:
            raise InputError(
                f'{self.folder}: this calibration set was recorded with other {", ".join(different)}. '
                'Remove it, or name another folder with --calibration.'
            )
        return dataclasses.replace(self.protocol, keep=wanted[KEPT], videos=wanted[VIDEOS])

    def _has_enough(self, found: Mapping[str, Any]) -> bool:
        """Return whether the set in the folder has at least as many calls of each graph as this protocol requires."""
        videos, wanted = found[VIDEOS], self.protocol.keep.items()
        if not isinstance(videos, int) or not isinstance(found[KEPT], dict):
            return False
        calls = {name: count * videos for name, count in found[KEPT].items()}
        enough = all(count * self.protocol.videos <= calls.get(name, -1) for name, count in wanted)
        return enough and all(self._folder(_CALIBRATION, number).is_dir() for number in range(videos))
