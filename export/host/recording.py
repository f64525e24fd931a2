"""Inputs and outputs of all graphs, recorded while the program generates videos in JAX.

Activation ranges must be measured on the latents, histories, memories and prompts of real generations, not on noise.
The recorded float32 outputs are the reference for exported graphs.

Legend: B batch, T latent frames, F video frames, H W full-size latent grid, h w a stage's grid, C channels.
Source: arXiv 2511.06055, section 4 (table 9: 50 to 500 samples per graph).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from export.graphs.runners import Call, RecordingRunner
from export.graphs.table import DENOISER
from neodragon_jax.generation import consistency_sampler, first_frame, pipeline
from neodragon_jax.models.super_resolution import upscale
from neodragon_jax.pyramid.portable_noise import PortableNoise, PortablePictureNoise
from neodragon_jax.pyramid.sampler import Denoiser, DrawnNoise, NoiseSource, Plan, Prompt, Unit, sample
from neodragon_jax.pyramid.schedule import Schedule

# Maximum number of calls of each graph kept per validation or evaluation video.
EVALUATION_CALLS = 8


class Sample(NamedTuple):
    """One denoiser call for one example, batch axis of 1 included; the arrays are on the host."""

    history: Sequence[Unit]
    x: Unit
    unit: Int[Array, ' 1']
    prompt: Prompt
    timestep: Float[Array, ' 1']
    flow: Unit


class Recorder:
    """A denoiser that wraps another and records every call.

    Attributes:
      samples: calls of every stage, in order; the caller may clear it.
    """

    def __init__(self, denoise: Denoiser) -> None:
        self.samples: defaultdict[int, list[Sample]] = defaultdict(list)
        self._denoise = denoise

    def __call__(
        self, stage: int, history: Sequence[Unit], x: Unit, unit: Array, prompt: Prompt, timestep: Array
    ) -> Unit:
        flow = self._denoise(stage, history, x, unit, prompt, timestep)
        call = jax.device_get(Sample(list(history), x, unit, prompt, timestep, flow))
        for index in range(len(call.x)):
            self.samples[stage].append(jax.tree.map(lambda a, i=index: a[i : i + 1], call))
        return flow


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Prompts, first frames and seed of a sequence of videos.

    Attributes:
      prompts: used in turn, without the modifier.
      modifier: appended to every prompt.
      negative_prompt: for plans with guidance.
      images: first frames in [-1, 1], used in turn; if empty, first frames are generated.
      seed: seed of all noise.
      portable: whether the noise is that of `pyramid.portable_noise`, which a player without JAX draws as well.
    """

    prompts: Sequence[str]
    modifier: str = ''
    negative_prompt: str = ''
    images: Sequence[Float[np.ndarray, 'H W 3']] = ()
    seed: int = 0
    portable: bool = False

    def text(self, number: int) -> str:
        """Return the prompt of a video, with the modifier."""
        return self.prompts[number % len(self.prompts)] + self.modifier

    def keys(self, number: int) -> Array:
        """Return the noise key [1] of a video; a prompt that recurs gets new noise."""
        text = self.prompts[number % len(self.prompts)]
        return pipeline.sample_keys(self.seed, [text], [number // len(self.prompts)])

    def portable_seed(self, number: int) -> int:
        """Return the seed of the portable noise of a video."""
        return self.seed + number

    def noise(self, number: int, schedule: Schedule) -> NoiseSource:
        """Return the denoiser's noise for a video."""
        if self.portable:
            return PortableNoise([self.portable_seed(number)], schedule)
        return DrawnNoise(self.keys(number), schedule)

    def picture_noise(self, number: int) -> consistency_sampler.PictureNoise:
        """Return the first-frame model's noise for a video."""
        if self.portable:
            return PortablePictureNoise([self.portable_seed(number)])
        return consistency_sampler.DrawnPictureNoise(self.keys(number))

    def image(self, number: int) -> Float[np.ndarray, '1 1 H W 3'] | None:
        """Return the given first frame of a video."""
        return np.asarray(self.images[number % len(self.images)])[None, None] if self.images else None


class Video(NamedTuple):
    """One generation: conditions, latents and frames; parts that were not generated are None."""

    prompt: Prompt
    negative: Prompt | None
    first_frame: Unit | None
    latents: Float[np.ndarray, '1 T H W C'] | None
    frames: np.ndarray | None  # bytes [1, F, _, _, 3]

    @property
    def generated(self) -> slice:
        """Latent frames that the denoiser generated: all except an encoded first frame."""
        return slice(0 if self.first_frame is None else 1, None)

    def replay(self, denoise: Denoiser, plan: Plan, noise: NoiseSource) -> Float[np.ndarray, '1 T H W C']:
        """Return the latents that another denoiser generates from the same conditions."""
        prompt, negative, first_frame = jax.tree.map(jnp.asarray, (self.prompt, self.negative, self.first_frame))
        return np.asarray(sample(denoise, plan, prompt, noise, negative, first_frame))


@dataclasses.dataclass(frozen=True)
class Program:
    """The whole program, from prompt to frames.

    Attributes:
      components: the modules, as functions of any kind.
      plan: latent size, steps and guidance.
      draw: generates first frames; None starts from a given image or from noise.
      enlarge: super-resolution of pictures [B, H, W, 3] in [0, 1]; None keeps the decoder's size.
      denoise: whether the denoiser runs.
      frames: whether latents are decoded.
    """

    components: pipeline.Components
    plan: Plan
    draw: first_frame.FirstFrameModel | None = None
    enlarge: Callable[[Array], Array] | None = None
    denoise: bool = True
    frames: bool = True

    def generate(self, scenes: Scenes, number: int) -> Video:
        """Generate a video."""
        guided = self.plan.guidance is not None or self.plan.first_guidance is not None
        prompt = self.components.encode_prompt([scenes.text(number)])
        negative = self.components.encode_prompt([scenes.negative_prompt]) if guided else None
        noise, picture = scenes.noise(number, self.plan.schedule), scenes.image(number)
        if self.draw is not None:
            drawn = self.draw([scenes.text(number)], scenes.picture_noise(number))
            size = (self.plan.height * pipeline.SPATIAL_FACTOR, self.plan.width * pipeline.SPATIAL_FACTOR)
            picture = first_frame.to_frames(drawn, *size) if picture is None else picture
        first = None if picture is None else pipeline.encode_first_frame(self.components, picture, noise)
        latents: Any = None
        frames: Any = None
        if self.denoise:
            latents = sample(self.components.denoise, self.plan, prompt, noise, negative, first)
            frames = pipeline.decode(self.components, latents) if self.frames else None
        if frames is not None and self.enlarge is not None:
            frames = upscale(self.enlarge, frames, at_once=1)
        return jax.device_get(Video(prompt, negative, first, latents, frames))


@dataclasses.dataclass(frozen=True)
class Recording:
    """A program that records the calls of its graphs.

    Attributes:
      program: the program over the recorders below.
      runners: recorders of all graphs but the denoiser's.
      denoiser: recorder of the denoiser.
    """

    program: Program
    runners: Mapping[str, RecordingRunner]
    denoiser: Recorder

    def generate(self, scenes: Scenes, number: int) -> tuple[Video, dict[str, list[Any]]]:
        """Generate a video; return it and the calls of every graph, as `Call` or `Sample`."""
        for runner in self.runners.values():
            runner.calls.clear()
        self.denoiser.samples.clear()
        video = self.program.generate(scenes, number)
        calls: dict[str, list[Any]] = {name: list(runner.calls) for name, runner in self.runners.items()}
        calls |= {f'{DENOISER}{stage}': list(samples) for stage, samples in self.denoiser.samples.items()}
        return video, calls


def calls_per_video(plan: Plan, first_frame_given: bool) -> dict[str, int]:
    """Return the number of calls of each graph per video.

    Args:
      first_frame_given: whether frame 0 is a picture, given or generated by the first-frame model.
    """
    prompts = 1 if plan.guidance is None and plan.first_guidance is None else 2
    units = range(1 if first_frame_given else 0, plan.frames)

    def denoiser_calls(stage: int) -> int:
        return sum(plan.unit_steps(unit)[stage] * (1 if plan.unit_guidance(unit) is None else 2) for unit in units)

    return {
        **dict.fromkeys(('clip_l', 'clip_g', 'dt5', 'context_adapter'), prompts),
        **dict.fromkeys(('first_frame_clip_l', 'first_frame_clip_g', 'first_frame_decoder', 'video_encoder'), 1),
        'first_frame_unet': len(consistency_sampler.TIMESTEPS),
        **{f'{DENOISER}{stage}': denoiser_calls(stage) for stage in range(plan.schedule.stages)},
        'video_decoder': plan.frames,
        'super_resolution': 1 + pipeline.TEMPORAL_FACTOR * (plan.frames - 1),
    }


def videos_needed(calls: Mapping[str, int], counts: Mapping[str, int]) -> int:
    """Return the number of videos that give every graph its number of calibration samples."""
    return max((-(-count // calls[name]) for name, count in counts.items()), default=0)


def kept_for_calibration(calls: Sequence[Any], keep: int, number: int, prompts: int) -> list[Any]:
    """Return the calls of a calibration video that are kept.

    Args:
      keep: how many.
      number: of the video.
      prompts: number of prompts, which the videos use in turn.
    """
    # Shift by one per pass over the prompts, so that every prompt covers all units and steps.
    return rotating(calls, keep, number + number // prompts)


def kept_for_evaluation(calls: Sequence[Any]) -> list[Any]:
    """Return the calls of a validation or evaluation video that are kept."""
    return spread(calls, EVALUATION_CALLS)


def rotating(calls: Sequence[Any], keep: int, turn: int) -> list[Any]:
    """Return `keep` evenly spaced calls of a video; the first index depends on `turn`.

    Over several videos all units and steps are covered, even if each video keeps only one call. The decoder's call with
    zero memories is only 1 of T.
    """
    keep, count = min(keep, len(calls)), len(calls)
    return [calls[index] for index in sorted((turn + number * count // keep) % count for number in range(keep))]


def spread(samples: Sequence[Any], count: int) -> list[Any]:
    """Return `count` evenly spaced samples, or all if there are fewer."""
    if count >= len(samples):
        return list(samples)
    return [samples[index] for index in np.linspace(0, len(samples) - 1, count).round().astype(int)]


def flatten(call: Call | Sample) -> dict[str, np.ndarray]:
    """Return the arrays of a call by path, such as `inputs.latent` or `history.0`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(call)
    return {jax.tree_util.keystr(path, simple=True, separator='.'): np.asarray(leaf) for path, leaf in leaves}


def unflatten(arrays: Mapping[str, np.ndarray]) -> Call | Sample:
    """Rebuild a call from arrays by path; the inverse of `flatten`."""
    if 'x' not in arrays:
        parts = {'inputs': {}, 'outputs': {}}
        for path, array in arrays.items():
            kind, _, name = path.partition('.')
            parts[kind][name] = array
        return Call(**parts)
    history = [arrays[f'history.{index}'] for index in range(sum(path.startswith('history.') for path in arrays))]
    prompt = Prompt(*(jnp.asarray(arrays[f'prompt.{field}']) for field in Prompt._fields))
    x, unit, timestep, flow = (jnp.asarray(arrays[name]) for name in ('x', 'unit', 'timestep', 'flow'))
    return Sample(list(map(jnp.asarray, history)), x, unit, prompt, timestep, flow)
