"""Generation sessions: a loaded checkpoint and video settings turn batches of prompts into finished videos."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from neodragon_jax.generation import first_frame, pipeline
from neodragon_jax.generation.consistency_sampler import TIMESTEPS, DrawnPictureNoise, PictureNoise
from neodragon_jax.generation.loading import LoadedCheckpoint
from neodragon_jax.generation.phases import Task, in_step
from neodragon_jax.generation.plan import VideoSettings
from neodragon_jax.pyramid.portable_noise import PortableNoise, PortablePictureNoise
from neodragon_jax.pyramid.sampler import DrawnNoise, NoiseSource, Plan

Frames = Float[np.ndarray, 'B 1 H W 3']

# Progress report: called after every step with the name of its phase.
OnStep = Callable[[str], object]

# Generates the first frames of a batch as a task, from prompts with modifier and noise.
FirstFrames = Callable[[Sequence[str], PictureNoise, OnStep], Task[Frames]]

# Batches that share one loading of each module with low_memory. Their frames wait in memory for the last phase.
BATCHES_PER_LOADING = 16


class Clip(NamedTuple):
    """Finished video."""

    frames: UInt8[np.ndarray, 'F _ _ 3']
    refused: bool  # by the safety checker, which made all frames, or the given or drawn first frame, black


@dataclasses.dataclass(frozen=True)
class Session:
    """Generator of batches of videos with one checkpoint and fixed settings.

    Attributes:
      loaded: the checkpoint.
      settings: of all videos.
      plan: the settings' plan with the denoiser's latent channels.
      first_frames: the source of first frames in [-1, 1]; None generates all frames.
      first_frame_steps: steps that this source takes.
      seed: of all videos.
    """

    loaded: LoadedCheckpoint
    settings: VideoSettings
    plan: Plan
    first_frames: FirstFrames | None
    first_frame_steps: int
    seed: int

    @classmethod
    def open(cls, loaded: LoadedCheckpoint, settings: VideoSettings, seed: int) -> Session:
        """Prepare a loaded checkpoint to make videos of some settings.

        Raises:
          InputError: the checkpoint cannot make such videos.
        """
        drawn = settings.picture is None and settings.first_frame == 'model'
        return cls(
            loaded=loaded,
            settings=settings,
            plan=loaded.components.check(settings.plan),
            first_frames=_drawn_frames(loaded, settings) if drawn else _given_frames(settings.picture),
            first_frame_steps=len(TIMESTEPS) if drawn else 0,
            seed=seed,
        )

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels of the decoded videos, before any upscaling."""
        return self.settings.size

    @property
    def first_unit(self) -> int:
        """The first unit that the denoiser generates."""
        return 0 if self.first_frames is None else 1

    @property
    def calls(self) -> int:
        """Denoiser evaluations per video."""
        return self.plan.calls(self.first_unit)

    @property
    def steps(self) -> int:
        """Progress steps per batch: of the first frame, of denoising, and one per decoded latent frame."""
        return self.first_frame_steps + self.plan.steps_total(self.first_unit) + self.plan.frames

    @property
    def videos_at_once(self) -> int:
        """Number of videos per call of `make`: one batch, or all batches that share a loading of the modules."""
        batches = BATCHES_PER_LOADING if self.loaded.store.one_at_a_time else 1
        return len(self.loaded.spread.devices) * batches

    def make(
        self, prompts: Sequence[str], numbers: Sequence[int], on_step: OnStep = lambda phase: None
    ) -> Iterator[Clip]:
        """Make videos, one per device at a time; with one module at a time in memory, phase by phase for all of them.

        Args:
          prompts: without modifier.
          numbers: sample number of each video among those of its prompt.
          on_step: called after each of `steps` with the name of its phase.
        """
        size, upscale = len(self.loaded.spread.devices), self.loaded.upscale
        starts = range(0, len(prompts), size)
        tasks = [self._batch(prompts[i : i + size], numbers[i : i + size], on_step) for i in starts]
        for clips, refused in in_step(tasks):
            clips = clips if upscale is None else upscale(clips)
            yield from (Clip(frames, bool(black)) for frames, black in zip(clips, refused, strict=True))

    def _batch(
        self, prompts: Sequence[str], numbers: Sequence[int], on_step: OnStep
    ) -> Task[tuple[np.ndarray, np.ndarray]]:
        """Generate the videos of a batch, with the mask of refused ones; a short batch is padded internally."""
        spread, checker = self.loaded.spread, self.loaded.checker
        missing = len(spread.devices) - len(prompts)
        texts = [*prompts, *[prompts[-1]] * missing]
        noise, picture_noise = self._noise(texts, [*numbers, *[numbers[-1]] * missing])
        texts = [text + self.settings.modifier for text in texts]
        frames, refused = None, np.zeros(len(texts), bool)
        if self.first_frames is not None:
            frames = yield from self.first_frames(texts, picture_noise, on_step)
            if checker is not None:
                yield frames
                frames, refused = checker.frames(frames)
            yield frames
        clips = yield from pipeline.generate_in_phases(
            self.loaded.components,
            self.plan,
            texts,
            noise,
            self.settings.negative,
            frames,
            on_step=lambda *arguments: _reached('denoising', on_step, arguments[-1]),
            shard=spread.shard,
            on_decoded=lambda index: on_step('decoding'),
        )
        if checker is not None:
            yield clips
            clips, also_refused = checker.videos(clips)
            refused = refused | also_refused
        return clips[: len(prompts)], refused[: len(prompts)]

    def _noise(self, prompts: Sequence[str], numbers: Sequence[int]) -> tuple[NoiseSource, PictureNoise]:
        """Return the noise of a batch, for its videos and for their first frames."""
        shard = self.loaded.spread.shard
        if self.settings.noise == 'portable':
            seeds = [self.seed + number for number in numbers]
            return PortableNoise(seeds, self.plan.schedule, shard), PortablePictureNoise(seeds, shard)
        keys = shard(pipeline.sample_keys(self.seed, prompts, numbers))
        return DrawnNoise(keys), DrawnPictureNoise(keys)


def _reached(phase: str, on_step: OnStep, x: Any) -> None:
    """Report a step once its result has been computed; JAX calls return earlier."""
    jax.block_until_ready(x)
    on_step(phase)


def _given_frames(picture: Float[np.ndarray, 'H W 3'] | None) -> FirstFrames | None:
    """Return the source that gives every video the same first frame; None without a picture."""
    if picture is None:
        return None

    def show(prompts: Sequence[str], noise: PictureNoise, on_step: OnStep) -> Task[Frames]:
        yield from ()  # no phase of its own
        return np.broadcast_to(picture, (len(prompts), 1, *picture.shape))

    return show


def _drawn_frames(loaded: LoadedCheckpoint, settings: VideoSettings) -> FirstFrames:
    """Return the source that draws first frames from prompts with the checkpoint's first-frame model."""
    _, height, width = settings.size
    model = loaded.first_frame_model(height, width)

    def draw(prompts: Sequence[str], noise: PictureNoise, on_step: OnStep) -> Task[Frames]:
        report = lambda number, latents: _reached('first frame', on_step, latents)
        pictures = yield from model.drawing(prompts, noise, loaded.spread.shard, report)
        return first_frame.to_frames(pictures, height, width)

    return draw
