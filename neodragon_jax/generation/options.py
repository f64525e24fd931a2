"""Options of generation as a caller gives them; None leaves a choice to the checkpoint's generation.json."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import shown
from neodragon_jax.generation import checks
from neodragon_jax.generation.defaults import FIRST_FRAMES, MAX_GUIDANCE, MODES, STAGES

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import UInt8

DTYPES = ('float32', 'bfloat16')
# jax: JAX's generator, keyed by prompt, seed and number; portable: keyed by seed + number, the same on every runtime.
NOISES = ('jax', 'portable')
# JAX keeps the low 32 bits of a seed, so a larger seed would repeat the videos of a smaller one.
MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Options that take effect when a checkpoint is loaded.

    Attributes:
      checkpoint: root folder of a checkpoint, or the name of a shipped one; None is the shipped default.
      mode: 'hybrid' (few-step denoiser) or 'monolithic' (multi-step denoiser); None is the checkpoint's choice.
      student: folder, or hf://ORG/NAME, of a distilled denoiser and its context adapter; None is the checkpoint's.
      upscale: folder of a super-resolution network that enlarges the frames; None keeps their size.
      dtype: compute type, 'float32' or 'bfloat16'; bfloat16 also halves the parameters' memory.
      low_memory: hold the parameters of one module at a time; the videos are the same.
      safety_checker: blacken the videos that the checkpoint's safety checker refuses.
      profile: time every module.
    """

    checkpoint: str | os.PathLike[str] | None = None
    mode: str | None = None
    student: str | os.PathLike[str] | None = None
    upscale: str | os.PathLike[str] | None = None
    dtype: str = 'float32'
    low_memory: bool = False
    safety_checker: bool = True
    profile: bool = False

    def __post_init__(self) -> None:
        for name in ('checkpoint', 'student', 'upscale'):
            _convert(self, name, checks.path)
        for name in ('low_memory', 'safety_checker', 'profile'):
            _convert(self, name, checks.truth)
        _convert(self, 'mode', checks.choice, MODES)
        _convert(self, 'dtype', checks.choice, DTYPES)


@dataclasses.dataclass(frozen=True)
class VideoOptions:
    """Options of the videos themselves.

    Attributes:
      frames: video frames, 8 n + 1.
      height, width: pixels, multiples of 64.
      steps: denoiser steps of the three stages, coarsest first; alone it also sets `first_steps`.
      first_steps: the same for unit 0, the first frame.
      guidance: classifier-free guidance scale, finite and not negative; alone it also sets `first_guidance`.
      first_guidance: the same for unit 0.
      prompt_modifier: text appended to every prompt.
      negative_prompt: text that guidance steers away from.
      first_frame: in hybrid mode 'model' (the checkpoint's first-frame model) or 'denoiser' makes the first frame.
      image: picture of the first frame: a file or RGB bytes; cropped at the center to the video's shape and resized.
      noise: one of NOISES.
    """

    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: Sequence[int] | None = None
    first_steps: Sequence[int] | None = None
    guidance: float | None = None
    first_guidance: float | None = None
    prompt_modifier: str | None = None
    negative_prompt: str | None = None
    first_frame: str | None = None
    image: str | os.PathLike[str] | UInt8[np.ndarray, 'H W 3'] | None = None
    noise: str = 'jax'

    def __post_init__(self) -> None:
        for name in ('frames', 'height', 'width'):
            _convert(self, name, checks.whole_number)
        for name in ('steps', 'first_steps'):
            _convert(self, name, _three_steps)
        for name in ('guidance', 'first_guidance'):
            _convert(self, name, checks.real_number, MAX_GUIDANCE)
        for name in ('prompt_modifier', 'negative_prompt'):
            _convert(self, name, checks.text)
        _convert(self, 'first_frame', checks.choice, FIRST_FRAMES)
        _convert(self, 'image', checks.picture)
        _convert(self, 'noise', checks.choice, NOISES)
        if self.image is not None and self.first_frame is not None:
            given = f'{self.image} ' if isinstance(self.image, str | os.PathLike) else ''
            raise InputError(f'--image {given}and --first-frame both set the first frame; pass one.')


def check_seed(seed: int) -> int:
    """Return a seed in 0..2**32-1.

    Raises:
      InputError: the seed is no whole number, or outside that range.
    """
    return checks.whole_number('--seed', seed, (0, MAX_SEED))


def check_number(number: int) -> int:
    """Return a sample number, which the generator of random numbers takes as it takes a seed.

    Raises:
      InputError: the number is no whole number, or too large.
    """
    return checks.whole_number('number', number, (0, MAX_SEED))


def _convert(options: Any, name: str, check: Callable[..., Any], *limits: Any) -> None:
    """Check an option, and keep it in its plain type; None passes only where it is the default."""
    value = getattr(options, name)
    if value is not None or options.__dataclass_fields__[name].default is not None:
        object.__setattr__(options, name, check(f'--{name.replace("_", "-")}', value, *limits))


def _three_steps(name: str, value: Any) -> tuple[int, ...]:
    """Return the numbers of steps of the three stages."""
    try:
        counts = tuple(value)
    except TypeError:
        counts = ()
    if isinstance(value, str) or len(counts) != STAGES:
        raise InputError(f'{name} is {shown(value)}; give {STAGES} whole numbers, one per stage.')
    return tuple(checks.whole_number(name, count) for count in counts)
