"""Options of generation as a caller gives them; None leaves a choice to the checkpoint's generation.json."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from neodragon_jax.base.errors import InputError, did_you_mean
from neodragon_jax.generation.defaults import MAX_GUIDANCE

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
        if self.dtype not in DTYPES:
            raise InputError(
                f'dtype {self.dtype!r} is unknown.{did_you_mean(self.dtype, DTYPES)} Use {" or ".join(DTYPES)}.'
            )


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
        if self.noise not in NOISES:
            raise InputError(
                f'noise {self.noise!r} is unknown.{did_you_mean(self.noise, NOISES)} Use {" or ".join(NOISES)}.'
            )
        for name in ('guidance', 'first_guidance'):
            scale = getattr(self, name)
            if scale is not None and not (math.isfinite(scale) and 0 <= scale <= MAX_GUIDANCE):
                raise InputError(f'--{name.replace("_", "-")} is {scale}; give a number from 0 to {MAX_GUIDANCE:g}.')
        if self.image is not None and self.first_frame is not None:
            given = f'{self.image} ' if isinstance(self.image, str | os.PathLike) else ''
            raise InputError(f'--image {given}and --first-frame both set the first frame; pass one.')


def check_seed(seed: int) -> int:
    """Return a seed in 0..2**32-1.

    Raises:
      InputError: the seed is outside that range.
    """
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f'--seed is {seed}; give a whole number from 0 to {MAX_SEED}.')
    return seed
