"""Evaluation of a student in the run: closed-loop videos of held-out prompts, beside the teacher's of the same prompts.

Every evaluation uses the same prompts, first frames and noise, so that two of them differ by the student alone. The
numbers are ratios, student over teacher, of the metrics of `neodragon_jax.evaluation.clip_metrics`; 1 equals the
teacher. Collapsed motion, blur and over-saturation show here long before they show in the losses.

Legend: V videos, T latent frames (= units), H W latent grid, C channels, F video frames.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from neodragon_jax.base import video
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.folders import VIDEO_VAE
from neodragon_jax.evaluation.clip_metrics import MIN_FRAMES, ClipMetrics, measure
from neodragon_jax.models.vae import CausalVAE, denormalize
from neodragon_jax.pyramid.sampler import DrawnNoise, Latents, Plan, Prompt, guided, jax_denoiser, sample
from train.dmd.closeness import behind_teacher_history, deviation, teacher_error
from train.dmd.rollout import Rollout
from train.dmd.updates import Updates
from train.flow.guidance import scale_by_unit
from train.runtime.processes import of_first_process
from train.runtime.program import DivergedError
from train.runtime.settings import check_range
from train.runtime.sharding import place, to_host

# Metrics that a good student shares with its teacher; flicker has no floor to compare with.
BAND_METRICS = ('motion', 'sharpness', 'saturation')
FRAMES_PER_UNIT = 8
# Added to numerator and denominator, in each metric's unit, so that the ratio is defined for still or gray videos.
_FLOORS = ClipMetrics(motion=0.05, flicker=0.05, sharpness=0.05, saturation=0.005)

Decode = Callable[[Float[np.ndarray, '1 T H W C']], UInt8[np.ndarray, 'F h w 3']]


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Options of the evaluation.

    Attributes:
      videos: V, samples held out from the end of the data; 0 for no evaluation.
      lowest, highest: band of the ratios of motion, sharpness and saturation.
      stop: end the run when a ratio leaves the band, instead of warning; the same command ends again.
      stop_after: steps before which the run is not ended.
    """

    videos: int = 0
    lowest: float = 0.5
    highest: float = 2.0
    stop: bool = False
    stop_after: int = 1000

    def __post_init__(self) -> None:
        check_range(self, 'videos', 'stop_after', least=0)
        if not 0 <= self.lowest < 1 < self.highest:
            raise InputError(f'lowest and highest are {self.lowest} and {self.highest}; enclose 1 by them.')


class HeldOut(NamedTuple):
    """Held-out samples on the devices, and the noise of their videos."""

    prompt: Prompt
    latents: Float[Array, 'V T H W C']
    noise: DrawnNoise


class StudentEvaluation:
    """The evaluation of one student on fixed prompts."""

    def __init__(
        self,
        config: EvaluationConfig,
        rollout: Rollout,
        first_unit: int,
        updates: Updates,
        negative: Prompt,
        held_out: Mapping[str, Any],
        decode: Decode,
    ) -> None:
        """Prepare.

        Args:
          rollout: the student's units, stages and steps.
          first_unit: the first unit that the student generates.
          updates: the denoisers of student and teacher.
          negative: conditioning of the negative prompt.
          held_out: latents [V, T, H, W, C], text [V, L, D], text_mask [V, L], pooled [V, p].
          decode: turns the latents of one video into frames.
        """
        self.config, self.rollout, self.first_unit = config, rollout, first_unit
        self.held_out, self.decode, self._params = held_out, decode, {}
        # Compiled once for all evaluations: they ask for the parameters at each call.
        self._student = jax_denoiser(updates.apply, lambda: self._params['student'])
        teacher = jax_denoiser(updates.teacher_apply, lambda: self._params['teacher'])
        self._teacher = guided(teacher, negative, scale_by_unit(updates.guidance, updates.first_guidance))

    def __call__(self, student: Any, teacher: Any, step: int, folder: pathlib.Path) -> dict[str, float]:
        """Write videos and contact sheets of the held-out prompts; return their comparison with the teacher's.

        Args:
          student, teacher: parameters.
        Returns:
          METRIC and METRIC/unit{u}, ratios; deviation_own, deviation_teacher and teacher_error, see `closeness`, the
          last as a ratio, also by unit; `distance`, the mean |log ratio| of the BAND_METRICS over the units, by which
          the best checkpoint may be kept; `outside_band`, the number of those ratios outside the band.
        Raises:
          DivergedError: a ratio is outside the band and the configuration says to stop; it has the comparison.
        """
        self._params = {'student': student, 'teacher': teacher}
        try:
            latents, metrics = self._sampled(self._placed(student))
        finally:
            self._params = {}
        if jax.process_index() == 0:
            videos = [self.decode(video_latents[None]) for video_latents in latents]
            self._write(videos, folder)
            ratios = compared(videos, self._teacher_videos, self.first_unit)
            metrics = ratios | metrics | band_metrics(ratios, self.config)
        metrics = of_first_process(metrics)
        if metrics['outside_band']:
            self._warn(metrics, step)
        return metrics

    def sample(self, student: Any) -> Float[np.ndarray, 'V T H W C']:
        """Return the student's latents for the held-out prompts, sampled with its own frames as history."""
        self._params = {'student': student}
        try:
            return np.asarray(to_host(self._own_history(self._placed(student))), np.float32)
        finally:
            self._params = {}

    def _placed(self, params: Any) -> HeldOut:
        """Return the held-out samples on the mesh of the parameters."""
        rows: Any = self.held_out
        # As numbers, because keys themselves cannot be placed on devices of other processes.
        seeds = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), len(rows['latents']))))
        prompt = Prompt(rows['text'], rows['text_mask'], rows['pooled'])
        prompt, seeds, latents = place((prompt, seeds, rows['latents']), params)
        noise = DrawnNoise(jax.jit(jax.random.wrap_key_data)(seeds), self.rollout.schedule)
        return HeldOut(prompt, jnp.asarray(latents, jnp.float32), noise)

    def _own_history(self, given: HeldOut) -> Latents:
        """Return the student's videos with its own frames as history, by the code of generation."""
        rollout, (_, frames, height, width, channels) = self.rollout, given.latents.shape
        plan = Plan(frames, height, width, channels, rollout.steps, rollout.first_steps, schedule=rollout.schedule)
        first = given.latents[:, :1] if self.first_unit else None
        return sample(self._student, plan, given.prompt, given.noise, first_frame=first)

    def _sampled(self, given: HeldOut) -> tuple[Float[np.ndarray, 'V T H W C'], dict[str, float]]:
        """Return the student's videos with its own frames as history, and their closeness to the teacher's."""
        own = self._own_history(given)
        common = (given.prompt, given.latents, self.first_unit, given.noise)
        forced = behind_teacher_history(self.rollout, self._student, *common)
        errors = [
            teacher_error(self._teacher, self.rollout, given.prompt, videos, jax.random.key(1))
            for videos in (own, given.latents)
        ]
        latents, forced, teacher = (np.asarray(to_host(videos), np.float32) for videos in (own, forced, given.latents))
        values = {
            'deviation_own': deviation(latents, teacher),
            'deviation_teacher': deviation(forced, teacher),
            'teacher_error': errors[0] / errors[1],
        }
        return latents, self._by_unit(values)

    def _by_unit(self, values: Mapping[str, Float[np.ndarray, ' T']]) -> dict[str, float]:
        """Return NAME/unit{u} of every generated unit, and NAME, their mean."""
        units = range(self.first_unit, self.rollout.frames)
        metrics = {name: float(np.mean(of_unit[self.first_unit :])) for name, of_unit in values.items()}
        return metrics | {f'{name}/unit{unit}': float(values[name][unit]) for name in values for unit in units}

    @functools.cached_property
    def _teacher_videos(self) -> list[UInt8[np.ndarray, 'F h w 3']]:
        """The teacher's videos of the same prompts."""
        return [self.decode(np.asarray(latents[None], np.float32)) for latents in self.held_out['latents']]

    def _write(self, videos: list[UInt8[np.ndarray, 'F h w 3']], folder: pathlib.Path) -> None:
        """Write student and teacher side by side, as videos and as contact sheets."""
        folder.mkdir(parents=True, exist_ok=True)
        for index, (student, teacher) in enumerate(zip(videos, self._teacher_videos, strict=True)):
            both = np.concatenate([student, teacher], axis=2)
            video.write_mp4(folder / f'{index:03d}.mp4', both)
            video.write_contact_sheet(folder / f'{index:03d}.png', both)

    def _warn(self, metrics: Mapping[str, float], step: int) -> None:
        """Warn of ratios outside the band; end the run if the configuration says so."""
        config = self.config
        outside = [name for name, value in metrics.items() if _has_band(name) and not _inside(value, config)]
        values = ', '.join(f'{name} {metrics[name]:.2f}' for name in outside)
        message = (
            f'step {step}: student over teacher outside {config.lowest}..{config.highest}: {values}; look at the '
            'videos of this step'
        )
        if config.stop and step >= config.stop_after:
            raise DivergedError(
                f'{message}. To go on from here, set config.dmd.evaluation.stop to False; to lower the learning rate '
                'before it, delete the checkpoints from this step on, or choose another workdir.',
                metrics,
            )
        if jax.process_index() == 0:
            print(f'warning: {message}.')


def compared(
    student: list[UInt8[np.ndarray, 'F h w 3']], teacher: list[UInt8[np.ndarray, 'F h w 3']], first_unit: int
) -> dict[str, float]:
    """Return METRIC/unit{u} for every generated unit, and METRIC, of the units' means: student over teacher.

    Unit 0 is one frame, so that it has sharpness and saturation alone; METRIC is without it, and absent without others.
    """
    units = range(max(first_unit, 1), 1 + (len(student[0]) - 1) // FRAMES_PER_UNIT)
    pairs = {unit: [unit_metrics(videos, unit) for videos in (student, teacher)] for unit in units}
    metrics = _ratios(*np.mean(list(pairs.values()), axis=0)) if pairs else {}
    for unit, pair in pairs.items():
        metrics |= {f'{name}/unit{unit}': value for name, value in _ratios(*pair).items()}
    if first_unit == 0:
        of_frame = _ratios(first_frame_metrics(student), first_frame_metrics(teacher))
        metrics |= {f'{name}/unit0': of_frame[name] for name in ('sharpness', 'saturation')}
    return metrics


def _ratios(ours: Float[np.ndarray, ' 4'], theirs: Float[np.ndarray, ' 4']) -> dict[str, float]:
    """Return METRIC, ours over theirs."""
    floors = np.asarray(_FLOORS)
    return dict(zip(ClipMetrics._fields, ((ours + floors) / (theirs + floors)).tolist(), strict=True))


def first_frame_metrics(videos: list[UInt8[np.ndarray, 'F h w 3']]) -> Float[np.ndarray, ' 4']:
    """Return the metrics of frame 0, as a still; means over videos."""
    stills = [frames[:1].repeat(MIN_FRAMES, axis=0) for frames in videos]
    return np.asarray([measure(still) for still in stills], np.float64).mean(axis=0)


def unit_metrics(videos: list[UInt8[np.ndarray, 'F h w 3']], unit: int) -> Float[np.ndarray, ' 4']:
    """Return the metrics of one unit > 0, from the last frame of the unit before; means over videos."""
    frames = slice(FRAMES_PER_UNIT * (unit - 1), FRAMES_PER_UNIT * unit + 1)
    return np.asarray([measure(frames_of_video[frames]) for frames_of_video in videos], np.float64).mean(axis=0)


def band_metrics(metrics: Mapping[str, float], config: EvaluationConfig) -> dict[str, float]:
    """Return `distance` and `outside_band` of ratios."""
    values = [value for name, value in metrics.items() if _has_band(name)]
    distance = float(np.mean([abs(math.log(value)) for value in values]))
    return {'distance': distance, 'outside_band': float(sum(not _inside(value, config) for value in values))}


def _has_band(name: str) -> bool:
    return '/' in name and name.partition('/')[0] in BAND_METRICS


def _inside(value: float, config: EvaluationConfig) -> bool:
    return config.lowest <= value <= config.highest


def checkpoint_decoder(root: str) -> Decode:
    """Return the decoder of a checkpoint's video VAE.

    Raises:
      InputError: the checkpoint has none.
    """
    module, params = checkpoint.load(checkpoint.component_folder(root, VIDEO_VAE), CausalVAE)
    decode = jax.jit(lambda params, z: module.apply({'params': params}, denormalize(z), method='decode'))
    return lambda latents: video.to_uint8(np.asarray(decode(params, latents))[0])
