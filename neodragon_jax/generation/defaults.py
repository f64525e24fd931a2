"""Defaults of generation with a checkpoint: `generation.json` in its root folder.

    {
      "frames": 17, "height": 64, "width": 64,
      "prompt_modifier": "", "negative_prompt": "",
      "modes": {
        "hybrid": {"first_frame": "denoiser"},
        "monolithic": {"steps": [10, 10, 10], "guidance": 2.0}
      },
      "prompts": "captions of one to three shapes that move",
      "example": "a small red circle moves right on a blue background"
    }

Every key is optional, and so is the file; the released values, which this module defines, fill the gaps. As on the
command line, `steps` and `guidance` alone also set those of unit 0.
Source of the released values: Neodragon, arXiv 2511.06055, and its released pipeline.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field

from neodragon_jax.base.errors import InputError, did_you_mean
from neodragon_jax.base.files import is_there
from neodragon_jax.base.json_file import SHOWN, read_json
from neodragon_jax.checkpoint import shipped
from neodragon_jax.pyramid.spacings import MAX_STEPS, SPACINGS

FILE = 'generation.json'
MAX_BYTES = 2**20
MODES = ('hybrid', 'monolithic')
# Sources of frame 0 without a given picture: the checkpoint's first-frame model, or the denoiser, as for other frames.
FIRST_FRAMES = ('model', 'denoiser')

# Video frames and pixels per latent, and latents per side of the denoiser's patches.
TEMPORAL_FACTOR = 8
SPATIAL_FACTOR = 8
PATCH = 2
STAGES = 3
# A side in pixels must be a multiple of this, so that the coarsest stage consists of whole patches.
SIDE_MULTIPLE = SPATIAL_FACTOR * PATCH * 2 ** (STAGES - 1)
# Limits far above any use; a mistyped number beyond them would fill the memory or run for days.
MAX_FRAMES, MAX_SIDE = 2**13 + 1, 2**13
# Larger scales only saturate, and overflow in bfloat16.
MAX_GUIDANCE = 1000.0

# Steps of the three stages, as a JSON file has them.
StepsPerStage = Annotated[
    tuple[Annotated[int, Field(ge=1, le=MAX_STEPS)], ...], Field(min_length=STAGES, max_length=STAGES)
]


@dataclasses.dataclass(frozen=True)
class ModeDefaults:
    """Defaults that differ between the two modes.

    Attributes:
      steps, first_steps: denoiser steps per stage, coarsest first; those of unit 0.
      guidance, first_guidance: classifier-free guidance scale, None for no guidance; that of unit 0.
      first_frame: one of FIRST_FRAMES.
      spacing: levels of several steps in a stage, see `Schedule`.
      given_first_frame: whether the denoiser has learned only what follows a given first frame (a student of protocol
        18), so that it cannot make the first frame itself.
    """

    steps: tuple[int, ...]
    first_steps: tuple[int, ...]
    guidance: float | None
    first_guidance: float | None
    first_frame: str
    spacing: str = 'released'
    given_first_frame: bool = False

    def with_values(self, given: Mapping[str, Any]) -> ModeDefaults:
        """Return a copy with some values changed; `steps` or `guidance` alone also changes unit 0."""
        first = {f'first_{name}': given[name] for name in ('steps', 'guidance') if name in given}
        return dataclasses.replace(self, **(first | dict(given)))


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """Defaults of a checkpoint; the values here are those of the released system.

    Attributes:
      mode: one of MODES.
      frames: frames of the video, 8 n + 1.
      height, width: in pixels, multiples of SIDE_MULTIPLE.
      prompt_modifier: appended to every prompt.
      negative_prompt: text that guidance steers away from.
      hybrid, monolithic: defaults of each mode; in the file under `modes`.
      prompts: one line on the prompts that the checkpoint was trained on; '' if unknown.
      example: one such prompt.
      world: name of the drawn world that `train.benchmark` trained the checkpoint on; '' for none.
    """

    mode: str = 'hybrid'
    frames: int = 49
    height: int = 320
    width: int = 512
    prompt_modifier: str = ', cinematic, realistic textures, high detail, natural colours'
    negative_prompt: str = (
        'cartoon style, worst quality, low quality, blurry, absolute black, absolute white, low res, extra limbs, '
        'extra digits, misplaced objects, mutated anatomy, monochrome, horror'
    )
    hybrid: ModeDefaults = ModeDefaults((1, 1, 1), (1, 1, 1), None, None, 'model')
    monolithic: ModeDefaults = ModeDefaults((10, 10, 10), (20, 20, 20), 5.0, 7.0, 'denoiser')
    prompts: str = ''
    example: str = ''
    world: str = ''

    def of(self, mode: str) -> ModeDefaults:
        """Return the defaults of a mode.

        Raises:
          InputError: the mode is unknown.
        """
        if mode not in MODES:
            raise InputError(f'mode {mode!r} is unknown; use one of {", ".join(MODES)}.')
        return self.hybrid if mode == 'hybrid' else self.monolithic


RELEASED = GenerationDefaults()


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Valid values of a key, and their description for messages."""

    fits: Callable[[Any], bool]
    remedy: str


def _is_whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _is_scale(value: Any) -> bool:
    return value is None or (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_GUIDANCE
    )


_FRAMES = _Kind(
    lambda value: _is_whole(value, MAX_FRAMES) and (value - 1) % TEMPORAL_FACTOR == 0,
    f'use 8 n + 1, such as 17, 25 or 49, at most {MAX_FRAMES}.',
)
_SIDE = _Kind(
    lambda value: _is_whole(value, MAX_SIDE) and value % SIDE_MULTIPLE == 0,
    f'use a positive multiple of {SIDE_MULTIPLE}, at most {MAX_SIDE}.',
)
_LINE = _Kind(lambda value: isinstance(value, str) and len(value.splitlines()) < 2, 'give a text of one line.')
_STEPS = _Kind(
    lambda value: (
        isinstance(value, list) and len(value) == STAGES and all(_is_whole(count, MAX_STEPS) for count in value)
    ),
    f'give {STAGES} numbers from 1 to {MAX_STEPS} in brackets, one per stage.',
)
_SCALE = _Kind(_is_scale, f'give a number from 0 to {MAX_GUIDANCE:g}, or null for no guidance.')
_OBJECT = _Kind(lambda value: isinstance(value, dict), 'give an object, {...}.')

_KINDS = {
    'mode': _Kind(lambda value: value in MODES, f'use one of {", ".join(MODES)}.'),
    'frames': _FRAMES,
    'height': _SIDE,
    'width': _SIDE,
    **dict.fromkeys(('prompt_modifier', 'negative_prompt', 'prompts', 'example', 'world'), _LINE),
    'modes': _OBJECT,
}
_MODE_KINDS = {
    **dict.fromkeys(('steps', 'first_steps'), _STEPS),
    **dict.fromkeys(('guidance', 'first_guidance'), _SCALE),
    'spacing': _Kind(lambda value: value in SPACINGS, f'use one of {", ".join(SPACINGS)}.'),
}
_FIRST_FRAME_KINDS = {
    'hybrid': _Kind(lambda value: value in FIRST_FRAMES, f'use one of {", ".join(FIRST_FRAMES)}.'),
    # The multi-step model begins with unit 0.
    'monolithic': _Kind(lambda value: value == 'denoiser', 'only "denoiser" is possible in this mode.'),
}


def check_size(frames: int, height: int, width: int) -> None:
    """Raise InputError unless a video of `frames` frames of `height` x `width` pixels fits the latent pyramid."""
    if not _FRAMES.fits(frames):
        raise InputError(f'{frames} frames; {_FRAMES.remedy}')
    for name, side in (('height', height), ('width', width)):
        if not _SIDE.fits(side):
            near = max(SIDE_MULTIPLE, round(side / SIDE_MULTIPLE) * SIDE_MULTIPLE)
            problem = f'is not a positive multiple of {SIDE_MULTIPLE}' if side <= MAX_SIDE else 'is too large'
            raise InputError(f'{name} {side} {problem}; use {min(near, MAX_SIDE)}.')


def choose_first_frame(given: str | None, mode: str, defaults: GenerationDefaults, picture: bool) -> str:
    """Return the source of frame 0: the given one, else the default of a mode.

    Args:
      picture: whether a picture is given, which takes the place of that source.
    Raises:
      InputError: the mode or the denoiser does not support the choice.
    """
    if given == 'model' and mode == 'monolithic':
        raise InputError('--first-frame model is for --mode hybrid; in monolithic mode the denoiser makes all frames.')
    chosen = given or defaults.of(mode).first_frame
    if chosen == 'denoiser' and defaults.of(mode).given_first_frame and not picture:
        raise InputError(
            'the first frame is to come from the denoiser, but this student has learned only what follows a given one '
            '(protocol 18 in its student.json); give --image, or --first-frame model if the checkpoint has that model.'
        )
    return chosen


def read(given: str | os.PathLike[str] | None) -> GenerationDefaults:
    """Return the defaults of a checkpoint; without the file, the released ones.

    Args:
      given: a folder or a name, see `shipped.find`.
    Raises:
      InputError: there is no such checkpoint, the file is damaged, a key is unknown, or a value is of a wrong kind.
    """
    path = shipped.find(given, ()) / FILE
    if not is_there(path):
        return RELEASED
    values = read_json(path, object, MAX_BYTES)
    if not isinstance(values, dict):
        raise InputError(f'{path}: not a JSON object. Write {{"frames": 17, ...}}, or remove it.')
    _check(path, '', values, _KINDS)
    modes = values.pop('modes', {})
    _check(path, 'modes.', modes, dict.fromkeys(MODES, _OBJECT))
    for mode, changes in modes.items():
        _check(path, f'modes.{mode}.', changes, _MODE_KINDS | {'first_frame': _FIRST_FRAME_KINDS[mode]})
        frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
        values[mode] = RELEASED.of(mode).with_values(frozen)
    return GenerationDefaults(**values)


def _check(path: pathlib.Path, prefix: str, values: Mapping[str, Any], kinds: Mapping[str, _Kind]) -> None:
    """Raise InputError unless all keys are known and their values have the right kinds."""
    for key, value in values.items():
        if key not in kinds:
            hint = did_you_mean(key, kinds)
            raise InputError(f'{path}: unknown key "{prefix}{key}".{hint} Known: {", ".join(kinds)}.')
        if not kinds[key].fits(value):
            raise InputError(f'{path}: "{prefix}{key}" is {_shown(value)}; {kinds[key].remedy}')


def _shown(value: Any) -> str:
    """Return a value as JSON, shortened for a message."""
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f'{text[: SHOWN - 3]}...'
