"""The calibration set on disk: one folder per generated video, and the protocol of the recording.

There are three kinds of videos, of disjoint prompts: calibration, validation and evaluation.

The folder of a video is created when the video is complete, so that an interrupted recording resumes. Its `record.json`
holds the sizes and hashes of its files, and the SHA-256 of the protocol that it depends on; a damaged video is recorded
again. A set is reused for the same protocol, also if it is larger, and rejected for any other. Only the code and tools
may differ: the videos that this export needs are then recorded again.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from export.host.file_records import damage, file_records, read_json
from export.host.protocol import KEPT, MADE_BY, VALIDATION, VIDEOS, Protocol, differences
from export.host.recording import (
    Call,
    Recording,
    Sample,
    Scenes,
    Video,
    flatten,
    kept_for_calibration,
    kept_for_evaluation,
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
      is_larger: whether the set has more graphs or videos than this program records.
    """

    folder: pathlib.Path
    protocol: Protocol
    is_larger: bool = False

    @classmethod
    def open(cls, folder: pathlib.Path, protocol: Protocol) -> CalibrationSet:
        """Return the set of a folder, with the protocol that it was recorded by; `record` completes its videos.

        Raises:
          InputError: the folder holds a set of another protocol, or its protocol is damaged.
        """
        agreed = cls(folder, protocol)._check_or_write_protocol()
        return cls(folder, agreed, (agreed.keep, agreed.videos) != (protocol.keep, protocol.videos))

    @property
    def videos(self) -> int:
        """Number of videos of all kinds."""
        return len(self._videos())

    def record(self, open_recording: Callable[[], Recording], on_video: Callable[[str], None]) -> None:
        """Generate the videos that are missing or damaged.

        Args:
          open_recording: loads the program; called only if a video has to be generated.
          on_video: called with one line per video, also for those recorded before.
        Raises:
          InputError: a video is damaged, and the program does not run all graphs of the set.
        """
        recording = None
        for kind, number in self._videos():
            name = f'{kind} video {number + 1} of {self._count(kind)}'
            harm = self._damage(kind, number)
            if harm == '':
                on_video(f'{name}: recorded before')
                continue
            if self.is_larger:
                raise InputError(
                    f'{self._folder(kind, number)}: {harm or "missing"}, and the set has more graphs or videos than '
                    'this export records. Repeat the export that recorded it, or name another folder with '
                    '--calibration.'
                )
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
        return _read_video(self._folder(_EVALUATION, number))

    def validation_video(self, number: int) -> Video:
        """Return the video of a validation prompt."""
        return _read_video(self._folder(_VALIDATION, number))

    def _videos(self) -> list[tuple[str, int]]:
        kinds = (_EVALUATION, _VALIDATION, _CALIBRATION)
        return [(kind, number) for kind in kinds for number in range(self._count(kind))]

    def _count(self, kind: str) -> int:
        return self.protocol.videos if kind == _CALIBRATION else len(self._scenes(kind).prompts)

    def _scenes(self, kind: str) -> Scenes:
        protocol = self.protocol
        kinds = {_CALIBRATION: protocol.scenes, _VALIDATION: protocol.validation, _EVALUATION: protocol.evaluation}
        return kinds[kind]

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
        if record.get('made_from_sha256') != self._made_from(kind):
            return 'it was recorded by other code or another protocol'
        return damage(folder, record.get('files')) or ''

    def _made_from(self, kind: str) -> str:
        return self.protocol.video_sha256(validates=kind == _VALIDATION)

    def _read(self, kind: str, number: int, name: str, index: int) -> Call | Sample:
        prefix = f'{index}|'
        with np.load(self._folder(kind, number) / f'{name}.npz') as arrays:
            return unflatten({key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)})

    def _write(
        self, kind: str, number: int, video: Video, calls: Mapping[str, Sequence[Any]], resources: Resources
    ) -> None:
        """Write the kept calls of a video; for a validation or evaluation video, also its latents and frames."""
        prompts = len(self.protocol.scenes.prompts)
        with atomic_folder(self._folder(kind, number), replace=True) as draft:
            for name, keep in self.protocol.keep.items():
                calibrates, made = kind == _CALIBRATION, calls[name]
                kept = kept_for_calibration(made, keep, number, prompts) if calibrates else kept_for_evaluation(made)
                arrays = {f'{i}|{path}': array for i, call in enumerate(kept) for path, array in flatten(call).items()}
                np.savez(draft / f'{name}.npz', **arrays)  # pyright: ignore[reportArgumentType]
            if kind != _CALIBRATION:
                np.savez(draft / 'video.npz', **flatten(video))  # pyright: ignore[reportArgumentType]
            record = {'resources': resources, 'made_from_sha256': self._made_from(kind), 'files': file_records(draft)}
            (draft / _RECORD).write_text(json.dumps(record, indent=2) + '\n')

    def _check_or_write_protocol(self) -> Protocol:
        """Return the protocol of the set in the folder, or write this one if there is none.

        A complete set with more calls or graphs than this protocol requires is also accepted.

        Raises:
          InputError: the folder holds a set of another protocol, or its protocol is damaged.
        """
        path = self.folder / _PROTOCOL
        if not path.is_file():
            return self._write_protocol(self.protocol.to_json())
        found = read_json(path)
        if found is None or not {KEPT, VIDEOS} <= set(found):
            raise InputError(f'{path}: damaged. Remove {self.folder} to record the calibration set again.')
        return self._agreed(found)

    def _write_protocol(self, values: Mapping[str, Any]) -> Protocol:
        with atomic_file(self.folder / _PROTOCOL) as draft:
            draft.write_text(json.dumps(values, indent=2) + '\n')
        return self.protocol

    def _agreed(self, found: Mapping[str, Any]) -> Protocol:
        """Return this protocol with the calls and videos of the set in the folder.

        For a set of other code or tools, and nothing else, this protocol is written: `record` then repeats the videos
        that this export needs.

        Raises:
          InputError: the set has another protocol, or fewer calls.
        """
        wanted = self.protocol.to_json()
        # Without quantized graphs no validation videos are asked for; those in the folder do no harm.
        wanted[VALIDATION] = wanted[VALIDATION] or found.get(VALIDATION, [])
        as_large = wanted
        if self.protocol.takes_no_more_calls_than(found):
            as_large = wanted | {key: found[key] for key in (KEPT, VIDEOS)}
        if differences(found, as_large) == [MADE_BY]:
            return self._write_protocol(wanted)
        if as_large != wanted and not self._is_complete(found):
            as_large = wanted
        if different := differences(found, as_large):
            raise InputError(
                f'{self.folder}: this calibration set was recorded with other {", ".join(different)}. '
                'Remove it, or name another folder with --calibration.'
            )
        return dataclasses.replace(self.protocol, keep=as_large[KEPT], videos=as_large[VIDEOS])

    def _is_complete(self, found: Mapping[str, Any]) -> bool:
        """Return whether the folder has all calibration videos of its protocol."""
        return all(self._folder(_CALIBRATION, number).is_dir() for number in range(found[VIDEOS]))


def _read_video(folder: pathlib.Path) -> Video:
    with np.load(folder / 'video.npz') as arrays:
        prompts = [
            Prompt(*(arrays[f'{kind}.{field}'] for field in Prompt._fields)) if f'{kind}.text' in arrays else None
            for kind in ('prompt', 'negative')
        ]
        others = [arrays.get(name) for name in ('first_frame', 'latents', 'frames')]
    return Video(*prompts, *others)  # pyright: ignore[reportArgumentType]
