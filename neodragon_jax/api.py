"""Python interface: load a checkpoint, generate videos, save them.

import neodragon_jax as nd

system = nd.load('moving_shapes')
video = system.generate('a small red circle moves right on a blue background', seed=0)
video.save('circle.mp4')
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import jax
import numpy as np
from jaxtyping import UInt8

from neodragon_jax.base.cpu_compilation import compile_faster_on_cpus
from neodragon_jax.base.errors import InputError
from neodragon_jax.generation import checks, tokens
from neodragon_jax.generation.defaults import GenerationDefaults
from neodragon_jax.generation.loading import LoadedCheckpoint, load_checkpoint
from neodragon_jax.generation.options import ModelOptions, VideoOptions, check_number, check_seed
from neodragon_jax.generation.plan import video_settings
from neodragon_jax.generation.result import Video
from neodragon_jax.generation.session import Session

__all__ = ['ModelOptions', 'Progress', 'System', 'Video', 'VideoOptions', 'load']

Picture = str | os.PathLike[str] | UInt8[np.ndarray, 'H W 3']


class Progress(NamedTuple):
    """A report of progress.

    Attributes:
      phase: 'first frame', 'denoising' or 'decoding'.
      done: steps of the call that are done.
      total: steps of the whole call.
    """

    phase: str
    done: int
    total: int


OnProgress = Callable[[Progress], object]


class System:
    """A loaded checkpoint that turns prompts into videos. Make one with `load`."""

    def __init__(self, loaded: LoadedCheckpoint) -> None:
        self.loaded = loaded

    @property
    def defaults(self) -> GenerationDefaults:
        """Values for the options that a call leaves out: those of generation.json, else the released ones."""
        return self.loaded.defaults

    @property
    def checks_safety(self) -> bool:
        """Whether videos pass a safety checker."""
        return self.loaded.checker is not None

    def cut_prompts(self, prompts: Sequence[str], modifier: str = '') -> tuple[int, list[str]]:
        """Return the text encoder's limit in tokens, and the prompts that with the modifier exceed it and are cut."""
        tokenizers = self.loaded.components.tokenizers
        assert tokenizers is not None, 'a loaded checkpoint has tokenizers'
        return tokenizers.t5.length, tokens.cut_prompts(tokenizers.t5, prompts, modifier)

    def __repr__(self) -> str:
        """Return the checkpoint, the mode, the devices and whether videos are checked."""
        devices = self.loaded.spread.devices
        safety = 'safety checker on' if self.checks_safety else 'no safety checker'
        return f'System({self.loaded.root.name}, {self.loaded.mode}, {len(devices)} x {devices[0].platform}, {safety})'

    @overload
    def generate(
        self, prompt: str, *, seed: int = ..., number: int = ..., progress: OnProgress | None = ...,
        image: Picture | None = ..., first_frame: str | None = ..., frames: int | None = ...,
        height: int | None = ..., width: int | None = ..., steps: Sequence[int] | None = ...,
        first_steps: Sequence[int] | None = ..., guidance: float | None = ..., first_guidance: float | None = ...,
        prompt_modifier: str | None = ..., negative_prompt: str | None = ..., noise: str = ...,
    ) -> Video: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: list[str] | tuple[str, ...], *, seed: int = ..., number: int = ...,
        progress: OnProgress | None = ..., image: Picture | None = ..., first_frame: str | None = ...,
        frames: int | None = ...,
        height: int | None = ..., width: int | None = ..., steps: Sequence[int] | None = ...,
        first_steps: Sequence[int] | None = ..., guidance: float | None = ..., first_guidance: float | None = ...,
        prompt_modifier: str | None = ..., negative_prompt: str | None = ..., noise: str = ...,
    ) -> list[Video]: ...  # fmt: skip

    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...],
        *,
        seed: int = 0,
        number: int = 0,
        progress: OnProgress | None = None,
        image: Picture | None = None,
        first_frame: str | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: Sequence[int] | None = None,
        first_steps: Sequence[int] | None = None,
        guidance: float | None = None,
        first_guidance: float | None = None,
        prompt_modifier: str | None = None,
        negative_prompt: str | None = None,
        noise: str = 'jax',
    ) -> Video | list[Video]:
        """Generate one video per prompt.

        A video depends on its prompt, seed and number, not on the other prompts of the call or on the devices. The
        first call of a size compiles.

        Args:
          prompt: a text, or a batch of texts; line breaks and double spaces become one space.
          seed: 0..2**32-1.
          number: sample number; with the same prompt and seed, other numbers give other videos. A text that repeats
            in a batch takes the next numbers.
          progress: called after every step.
          image: the first frame: a PNG or JPEG file, or RGB bytes uint8 [H, W, 3] of any size. It is cropped at the
            center to the video's shape.
          first_frame: 'model' or 'denoiser', the source of the first frame in hybrid mode without `image`.
          frames: 8 n + 1.
          height: pixels, a multiple of 64.
          width: pixels, a multiple of 64.
          steps: denoiser steps per stage, coarsest first, for all units.
          first_steps: the same for unit 0, the first frame.
          guidance: classifier-free guidance scale for all units.
          first_guidance: the same for unit 0.
          prompt_modifier: text appended to every prompt.
          negative_prompt: text that guidance steers away from.
          noise: 'jax', or 'portable', which JAX, NumPy and C++ reproduce bit for bit and which depends on seed + number
            but not on the prompt.
        Returns:
          A video for a text, a list of videos for a batch.
        Raises:
          InputError: an option is out of range or does not fit the checkpoint, or the picture cannot be read.
        """
        options = VideoOptions(
            frames, height, width, steps, first_steps, guidance, first_guidance, prompt_modifier, negative_prompt,
            first_frame, image, noise,
        )  # fmt: skip
        prompts = checks.prompts([prompt] if isinstance(prompt, str) else prompt)
        numbers = [check_number(number) + prompts[:index].count(text) for index, text in enumerate(prompts)]
        videos = list(self.stream(prompts, numbers, seed, options, progress))
        return videos[0] if isinstance(prompt, str) else videos

    def stream(
        self,
        prompts: Sequence[str],
        numbers: Sequence[int] | None = None,
        seed: int = 0,
        options: VideoOptions | None = None,
        progress: OnProgress | None = None,
    ) -> Iterator[Video]:
        """Yield one video per prompt, in order, each as soon as it is finished.

        Args:
          prompts: texts, which may repeat.
          numbers: sample number of each video; None is 0 for all.
          seed: 0..2**32-1.
          options: settings of the videos.
          progress: called after every step.
        Raises:
          InputError: an option is out of range or does not fit the checkpoint, or the picture cannot be read.
        """
        session, prompts = self.session(options, seed), checks.prompts(prompts)
        numbers = [0] * len(prompts) if numbers is None else [check_number(number) for number in numbers]
        if len(numbers) != len(prompts):
            raise InputError(f'numbers has {len(numbers)} entries for {len(prompts)} prompts; give one for each.')
        count, done = session.videos_at_once, 0
        batches = -(-len(prompts) // len(self.loaded.spread.devices))

        def report(phase: str) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(Progress(phase, done, batches * session.steps))

        for start in range(0, len(prompts), count):
            some = slice(start, start + count)
            clips = session.make(prompts[some], numbers[some], report)
            for prompt, number, clip in zip(prompts[some], numbers[some], clips, strict=True):
                yield Video(clip.frames, prompt, session.seed, number, clip.refused)

    def session(self, options: VideoOptions | None = None, seed: int = 0) -> Session:
        """Return the checkpoint prepared for videos of some settings: sizes, steps and denoiser calls.

        Raises:
          InputError: an option is out of range or does not fit the checkpoint, or the picture cannot be read.
        """
        settings = video_settings(options or VideoOptions(), self.loaded.mode, self.defaults)
        return Session.open(self.loaded, settings, check_seed(seed))


def load(
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    mode: str | None = None,
    student: str | os.PathLike[str] | None = None,
    upscale: str | os.PathLike[str] | None = None,
    dtype: str = 'float32',
    low_memory: bool = False,
    safety_checker: bool = True,
    profile: bool = False,
    devices: Sequence[Any] | None = None,
) -> System:
    """Load a checkpoint.

    Args:
      checkpoint: root folder of a checkpoint, the name of a shipped one, or one of the Hugging Face hub,
        'hf://ORG/NAME@REVISION', of which the folders that the mode needs are downloaded; None is 'moving_shapes'.
      mode: 'hybrid' (few-step denoiser) or 'monolithic' (multi-step denoiser); None is the checkpoint's choice.
      student: folder of a distilled denoiser and its context adapter, such as RUN/result of train.dmd.
      upscale: folder of a super-resolution network that enlarges the frames.
      dtype: compute type, 'float32' or 'bfloat16'; bfloat16 also halves the parameters' memory.
      low_memory: hold the parameters of one module at a time; the videos are the same.
      safety_checker: blacken the videos that the checkpoint's safety checker refuses. Without such a component in the
        checkpoint nothing is checked; see `System.checks_safety`.
      profile: time every module; `System.loaded.profile` has the times.
      devices: JAX devices such as `jax.local_devices()`; one video of a batch is made on each. None takes the first.
    Raises:
      InputError: there is no such checkpoint or no device, an option does not fit it, or a file is missing or damaged.
    """
    compile_faster_on_cpus()
    options = ModelOptions(checkpoint, mode, student, upscale, dtype, low_memory, safety_checker, profile)
    devices = jax.local_devices()[:1] if devices is None else devices
    if not len(devices):
        raise InputError('devices is empty; give at least one, such as jax.local_devices()[:1].')
    return System(load_checkpoint(options, devices))
