"""The calibration set on disk: one folder per generated video, and the protocol that it was recorded by.

A video's folder appears when it is complete, so a killed recording goes on where it stopped. The protocol names the
weights of every component and everything that decides what is generated: a set is used again for the same protocol,
and refused for any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from export.host.recording import Call, Recording, Sample, Scenes, Video, flatten, rotating, spread, unflatten
from export.measure.resources import Resources, measured
from neodragon_jax.base.atomic import atomic_file, atomic_folder
from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.sampler import Plan, Prompt

# Changes when the files below do.
FORMAT = 2
_SPENT = 'spent.json'
_KEPT, _VIDEOS = 'calls kept per video', 'videos'
# The first video is kept apart, with this many calls of each graph, to judge graphs by.
EVALUATION_CALLS = 8


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What decides the content of a calibration set.

    Attributes:
      components: SHA-256 of the weights of every component, by name.
      scenes: prompts, images and seed.
      plan: sizes and steps.
      keep: calls that every video keeps of each graph.
      videos: how many, without the one for evaluation.
    """

    components: Mapping[str, str]
    scenes: Scenes
    plan: Plan
    keep: Mapping[str, int]
    videos: int

    def to_json(self) -> dict[str, Any]:
        """Return it as a flat table."""
        images = hashlib.sha256(b''.join(np.ascontiguousarray(image).tobytes() for image in self.scenes.images))
        return {
            'format': FORMAT,
            **{f'weights of {name}': digest for name, digest in self.components.items()},
            'prompts': list(self.scenes.prompts),
            'modifier': self.scenes.modifier,
            'negative prompt': self.scenes.negative_prompt,
            'images': images.hexdigest() if self.scenes.images else None,
            'seed': self.scenes.seed,
            'plan': json.loads(json.dumps(dataclasses.asdict(self.plan))),
            _KEPT: dict(self.keep),
            _VIDEOS: self.videos,
        }


def folder_sha256(folder: pathlib.Path) -> str:
    """Return the hash of a component's config and weights."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob('*.safetensors'), folder / 'config.json']):
        with path.open('rb') as file:
            digest.update(hashlib.file_digest(file, 'sha256').digest())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A recorded calibration set.

    Attributes:
      folder: where it is.
      protocol: what it was recorded by.
    """

    folder: pathlib.Path
    protocol: Protocol

    @classmethod
    def record(
        cls,
        folder: pathlib.Path,
        protocol: Protocol,
        open_recording: Callable[[], Recording],
        on_video: Callable[[str], None],
    ) -> Dataset:
        """Generate the videos that are not there yet.

        Args:
          open_recording: loads the program; called only if a video is missing.
          on_video: called with a line for every video.
        Raises:
          InputError: the folder holds a set of another protocol, or one that has too few calls.
        """
        dataset = cls(folder, protocol)
        dataset = dataclasses.replace(dataset, protocol=dataset._check_or_write_protocol())
        recording = None
        for number in range(protocol.videos + 1):
            name = f'video {number} of {protocol.videos}'
            if dataset._video(number).is_dir():
                on_video(f'{name}: recorded before')
                continue
            with measured() as spent:
                recording = recording or open_recording()
                video, calls = recording.generate(protocol.scenes, number)
            dataset._write(number, video, calls, spent)
            on_video(f'{name}: recorded')
        return dataset

    @property
    def spent(self) -> list[Resources]:
        """What recording each video took."""
        folders = (self._video(number) for number in range(self.protocol.videos + 1))
        return [json.loads((folder / _SPENT).read_text()) for folder in folders]

    @property
    def sha256(self) -> str:
        """Hash of the protocol, and so of the content."""
        return hashlib.sha256(json.dumps(self.protocol.to_json(), sort_keys=True).encode()).hexdigest()

    def calls(self, name: str, count: int) -> Iterator[Any]:
        """Yield up to `count` calibration calls of a graph, as `Call` or `Sample`, read one by one."""
        entries = [
            (number, index)
            for number in range(1, self.protocol.videos + 1)
            for index in range(self.protocol.keep[name])
        ]
        for number, index in spread(entries, count):
            yield self._read(number, name, index)

    def evaluation(self, name: str, count: int) -> list[Any]:
        """Return up to `count` calls of a graph in the video that calibration did not see."""
        with np.load(self._video(0) / f'{name}.npz') as arrays:
            kept = len({key.partition('|')[0] for key in arrays})
        return [self._read(0, name, index) for index in spread(range(kept), count)]

    def video(self) -> Video:
        """Return the video that calibration did not see."""
        with np.load(self._video(0) / 'video.npz') as arrays:
            prompts = [
                Prompt(*(arrays[f'{kind}.{field}'] for field in Prompt._fields)) if f'{kind}.text' in arrays else None
                for kind in ('prompt', 'negative')
            ]
            others = [arrays.get(name) for name in ('first_frame', 'latents', 'frames')]
        return Video(*prompts, *others)  # pyright: ignore[reportArgumentType]

    def _video(self, number: int) -> pathlib.Path:
        return self.folder / f'video-{number:05d}'

    def _read(self, number: int, name: str, index: int) -> Call | Sample:
        prefix = f'{index}|'
        with np.load(self._video(number) / f'{name}.npz') as arrays:
            return unflatten({key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)})

    def _write(self, number: int, video: Video, calls: Mapping[str, Sequence[Any]], spent: Resources) -> None:
        """Write what is kept of a video."""
        with atomic_folder(self._video(number)) as draft:
            for name, keep in self.protocol.keep.items():
                kept = rotating(calls[name], keep, number) if number else spread(calls[name], EVALUATION_CALLS)
                arrays = {f'{i}|{path}': array for i, call in enumerate(kept) for path, array in flatten(call).items()}
                np.savez(draft / f'{name}.npz', **arrays)  # pyright: ignore[reportArgumentType]
            if number == 0:
                np.savez(draft / 'video.npz', **flatten(video))  # pyright: ignore[reportArgumentType]
            (draft / _SPENT).write_text(json.dumps(spent) + '\n')

    def _check_or_write_protocol(self) -> Protocol:
        """Return the protocol of the set in the folder; write this one if there is none.

        A complete set of more calls or graphs than are wanted is as good.

        Raises:
          InputError: the folder holds a set of another protocol.
        """
        path, wanted = self.folder / 'protocol.json', self.protocol.to_json()
        if not path.is_file():
            with atomic_file(path) as draft:
                draft.write_text(json.dumps(wanted, indent=2) + '\n')
            return self.protocol
        found = json.loads(path.read_text())
        if self._has_enough(found):
            wanted |= {key: found[key] for key in (_KEPT, _VIDEOS)}
        different = sorted(key for key in {**wanted, **found} if found.get(key) != wanted.get(key))
        if different:
            raise InputError(
                f'{self.folder}: this calibration set was recorded with other {", ".join(different)}. '
                'Remove it, or name another folder with --calibration.'
            )
        return dataclasses.replace(self.protocol, keep=wanted[_KEPT], videos=wanted[_VIDEOS])

    def _has_enough(self, found: Mapping[str, Any]) -> bool:
        """Return whether a set is complete and has as many calls of each graph as this protocol asks for."""
        videos, wanted = found[_VIDEOS], self.protocol.keep.items()
        calls = {name: count * videos for name, count in found[_KEPT].items()}
        enough = all(count * self.protocol.videos <= calls.get(name, -1) for name, count in wanted)
        return enough and all(self._video(number).is_dir() for number in range(videos + 1))
