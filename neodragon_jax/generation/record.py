"""Record of how a video was made, in the text of its contact sheet; and whether the files of a video are whole."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import av.error
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.bucket import StoragePath
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import as_json, parse_json, shown
from neodragon_jax.base.paths import input_path
from neodragon_jax.base.video_stream import open_container
from neodragon_jax.checkpoint import folders, hub, shipped
from neodragon_jax.checkpoint.fingerprint import sampled_fingerprint
from neodragon_jax.generation import defaults
from neodragon_jax.generation.options import ModelOptions, VideoOptions
from neodragon_jax.generation.plan import VideoSettings, video_settings
from neodragon_jax.generation.result import Video
from neodragon_jax.generation.student import find_student, with_student

KEY = 'neodragon_jax'


def make_record(model: ModelOptions, video: VideoOptions, seed: int) -> dict[str, Any]:
    """Return all that a video depends on, besides its prompt and its number, as JSON has it.

    Raises:
      InputError: there is no such checkpoint, or an option is out of range.
    """
    values = defaults.read(model.checkpoint)
    mode = model.mode or values.mode
    student = None if model.student is None else find_student(model.student, mode)
    if student is not None:
        values = with_student(values, student)
    settings = video_settings(video, mode, values)
    first_frame = settings.first_frame if settings.picture is None else 'denoiser'
    needed = hub.needed_folders(mode, first_frame)
    root = shipped.find(model.checkpoint, needed)
    # Not of the checkpoint: the student's own parts, and those that are switched off.
    own = (folders.STUDENT, folders.STUDENT_ADAPTER) if student else ()
    off = () if model.safety_checker else (folders.SAFETY_CHECKER, folders.FEATURE_EXTRACTOR)
    parts = {name: _content(root / name) for name in needed if name not in (*own, *off)}
    # In this order they are compared, so that a difference has its plainest name.
    record = {
        'seed': seed,
        'mode': mode,
        **_of_settings(settings),
        'dtype': model.dtype,
        'safety_checker': parts.get(folders.SAFETY_CHECKER) is not None,
        'student': None if student is None else [_content(student / name) for name in own],
        'upscale': None if model.upscale is None else _content(input_path(model.upscale, '--upscale')),
        'checkpoint': hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16],
    }
    return as_json(record)


def _content(folder: pathlib.Path) -> str | None:
    """Return the identity of a component; None if it is absent, which is for the loading to judge."""
    return sampled_fingerprint(folder) if folder.is_dir() else None


def _of_settings(settings: VideoSettings) -> dict[str, Any]:
    """Return the entries of the size, the sampling, the texts and the first frame."""
    plan, picture = settings.plan, settings.picture
    guided = plan.guidance is not None or plan.first_guidance is not None
    return {
        **dict(zip(('frames', 'height', 'width'), settings.size, strict=True)),
        'steps': plan.steps,
        'first_steps': plan.first_steps,
        'guidance': plan.guidance,
        'first_guidance': plan.first_guidance,
        'spacing': plan.schedule.spacing,
        'noise': settings.noise,
        'prompt_modifier': settings.modifier,
        'negative_prompt': settings.negative if guided else None,
        'image': None if picture is None else hashlib.sha256(picture.tobytes()).hexdigest()[:16],
        'first_frame': settings.first_frame if picture is None else None,
    }


def write_sheet(path: StoragePath, clip: Video, record: Mapping[str, Any]) -> None:
    """Write the contact sheet of a video as PNG, with the record of how the video was made."""
    text = PngInfo()
    text.add_itxt(KEY, json.dumps({'prompt': clip.prompt, 'number': clip.number, **record}))
    with atomic_file(path) as temporary:
        clip.contact_sheet().save(temporary, format='PNG', pnginfo=text)


def check_record(path: StoragePath, record: Mapping[str, Any]) -> bool:
    """Return whether the contact sheet of an existing video tells how it was made.

    Raises:
      InputError: it was made with other settings.
    """
    try:
        with path.open('rb') as file, Image.open(file, formats=('PNG',)) as sheet:
            found = parse_json(sheet.info[KEY], dict[str, Any], str(path))
    except (KeyError, InputError):
        return False
    for name, value in record.items():
        if name in found and found[name] != value:
            raise InputError(
                f'{path.with_suffix(".mp4")}: was made with {name} {shown(found[name])}; this run has {shown(value)}. '
                'Give another --out, or delete the old videos.'
            )
    return True


def is_whole(path: StoragePath) -> bool:
    """Return whether a video and its contact sheet can be read to their ends; nothing is decoded."""
    try:
        with path.with_suffix('.png').open('rb') as file, Image.open(file, formats=('PNG',)) as sheet:
            sheet.verify()
        with path.open('rb') as file, open_container(file) as container:
            track = container.streams.video[0]
            packets = [packet for packet in container.demux(track) if packet.size]
            return 0 < len(packets) == track.frames and not any(packet.is_corrupt for packet in packets)
    except (OSError, SyntaxError, ValueError, IndexError, av.error.FFmpegError):
        return False
