"""Evaluation of a flow-matching denoiser: loss per unit and stage on held-out samples, and guided videos.

Every evaluation uses the same samples, levels and noise, so that two evaluations differ by the parameters only.

Legend: V held-out samples, B samples at a time, T latent frames, H W latent grid, C channels.
Source: Pyramid-Flow, arXiv 2410.05954.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from neodragon_jax.base import video
from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.on_mesh import jit_on_mesh
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.models.vae import CausalVAE, denormalize
from neodragon_jax.pyramid.sampler import Denoiser, DrawnNoise, Plan, Prompt, guided, jax_denoiser, sample
from neodragon_jax.pyramid.schedule import Schedule
from train.flow import flow_matching, losses
from train.flow.guidance import scale_by_unit
from train.runtime.settings import PathText
from train.runtime.sharding import place, to_host

Batch = Mapping[str, Any]
SAMPLES = 'samples.npz'


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Options of the held-out samples and of the sampled videos.

    Attributes:
      examples: V, the samples at the end of the data, excluded from training.
      batch: B, held-out samples at a time, a divisor of V.
      samples: number of videos to sample, of the first held-out prompts; 0 for none.
      steps, first_steps: steps per stage, for units > 0 and for unit 0.
      guidance, first_guidance: guidance scale of units > 0 and of unit 0.
      decoder: component folder of a video VAE that decodes the samples; '' writes only latents.
    """

    examples: int = 64
    batch: int = 16
    samples: int = 8
    steps: tuple[int, ...] = (10, 10, 10)
    first_steps: tuple[int, ...] = (20, 20, 20)
    guidance: float = 5.0
    first_guidance: float = 7.0
    decoder: PathText = ''

    def __post_init__(self) -> None:
        if self.examples < 1 or self.batch < 1 or self.examples % self.batch:
            raise InputError(
                f'examples is {self.examples} and batch {self.batch}; hold out a positive multiple of the batch.'
            )
        if not 0 <= self.samples <= self.examples:
            raise InputError(f'samples is {self.samples}; choose 0 to {self.examples}, the held-out examples.')


class FlowEvaluation:
    """The evaluation of one denoiser on fixed samples."""

    def __init__(
        self,
        config: EvaluationConfig,
        apply: Callable[..., Any],
        held_out: Mapping[str, Any],
        null: Mapping[str, Any],
        schedule: Schedule,
    ) -> None:
        """Store the samples, and compile nothing yet.

        Args:
          apply: `apply({'params': params}, clips, text, mask, pooled, timestep, frame_ids)`.
          held_out: latents [V, T, H, W, C], units [V], text, text_mask and pooled.
          null: negative prompt of the guidance, without a batch axis: text, text_mask, pooled.
        """
        self.config, self.schedule, self.held_out = config, schedule, held_out
        self.negative = Prompt(null['text'], null['text_mask'], null['pooled'])
        self._params: Any = None  # an argument of the denoiser, so that it is compiled once for all evaluations
        self._denoise = jax_denoiser(apply, lambda: self._params)
        self._errors = jit_on_mesh(functools.partial(unit_errors, apply, schedule), static_argnums=(0,))

    def __call__(self, params: Any, folder: pathlib.Path) -> dict[str, float]:
        """Return the losses and the statistics of sampled videos; write the videos into `folder`."""
        metrics = self.losses(params)
        return metrics | (self.sample(params, folder) if self.config.samples else {})

    def losses(self, params: Any) -> dict[str, float]:
        """Return the losses validation/stage{s}/unit{u}, and as `validation` their mean over all pairs with samples."""
        frames, stages = self.held_out['latents'].shape[1], self.schedule.stages
        sums = np.zeros((stages, frames))
        counts = np.zeros(frames)
        for index, batch in enumerate(self._batches(params)):
            valid = self._rows(index, 'units')[:, None] > np.arange(frames)
            counts += valid.sum(axis=0)
            key = jax.random.fold_in(jax.random.key(0), index)
            for stage in range(stages):
                errors = [to_host(self._errors(stage, params, batch, np.int32(u), key)) for u in range(frames)]
                sums[stage] += (np.stack(errors, axis=1) * valid).sum(axis=0)
        means = {
            f'validation/stage{stage}/unit{unit}': float(sums[stage, unit] / counts[unit])
            for stage in range(stages)
            for unit in range(frames)
            if counts[unit]
        }
        return {'validation': float(np.mean(list(means.values())))} | means

    def sample(self, params: Any, folder: pathlib.Path) -> dict[str, float]:
        """Write guided videos of the first held-out prompts; return their motion and deviation relative to the data.

        `sample/motion` is the mean absolute difference of neighboring latent frames, divided by that of the held-out
        videos. `sample/deviation` is the same ratio of standard deviations. Both are 1 for samples like the data.
        """
        config, count = self.config, self.config.samples
        rows: dict[str, Any] = {name: array[:count] for name, array in self.held_out.items()}
        _, frames, height, width, channels = rows['latents'].shape
        plan = Plan(frames, height, width, channels, config.steps, config.first_steps, schedule=self.schedule)
        scale = scale_by_unit(config.guidance, config.first_guidance)
        # Raw key data, because typed keys cannot be placed on devices of other processes.
        seeds = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), count)))
        prompt, seeds = place((Prompt(rows['text'], rows['text_mask'], rows['pooled']), seeds), params)
        noise = DrawnNoise(jax.jit(jax.random.wrap_key_data)(seeds), self.schedule)
        self._params = params
        try:
            latents = sample(guided(self._denoise, self.negative, scale), plan, prompt, noise)
        finally:
            self._params = None
        latents = np.asarray(to_host(latents), np.float32)
        if jax.process_index() == 0:
            self._write(latents, folder)
        videos = self.held_out['units'] == frames
        real = np.asarray(self.held_out['latents'][videos], np.float32)
        metrics = {'sample/deviation': float(latents.std() / np.asarray(self.held_out['latents'], np.float32).std())}
        if frames > 1 and len(real):
            metrics['sample/motion'] = motion(latents) / motion(real)
        return metrics

    def _write(self, latents: Float[np.ndarray, 'B T H W C'], folder: pathlib.Path) -> None:
        """Write latents, and videos if there is a decoder."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / SAMPLES) as path, path.open('wb') as file:
            np.savez(file, latents=latents)
        if not self.config.decoder:
            return
        decode = self._decoder
        for index, video_latents in enumerate(latents):
            frames = video.to_uint8(np.asarray(decode(video_latents[None]))[0])
            video.write_mp4(folder / f'{index:03d}.mp4', frames)

    @functools.cached_property
    def _decoder(self) -> Callable[[Any], Any]:
        """Return the function from normalized latents to frames."""
        module, params = checkpoint.load(self.config.decoder, CausalVAE)
        return jax.jit(lambda latents: module.apply({'params': params}, denormalize(latents), method='decode'))

    def _batches(self, params: Any) -> Iterator[dict[str, Any]]:
        for index in range(self.config.examples // self.config.batch):
            yield place({name: self._rows(index, name) for name in self.held_out}, params)

    def _rows(self, index: int, name: str) -> np.ndarray:
        return self.held_out[name][index * self.config.batch : (index + 1) * self.config.batch]


def unit_errors(
    apply: Callable[..., Any],
    schedule: Schedule,
    stage: int,
    params: Any,
    batch: Batch,
    unit: Int[Array, ''],
    key: PRNGKeyArray,
) -> Float[Array, ' B']:
    """Return the flow matching loss of every sample at one unit and stage."""
    latents = batch['latents']
    units = jnp.broadcast_to(unit, latents.shape[:1])
    draws = flow_matching.draw(key, stage, latents.shape, units + 1, schedule)._replace(unit=units)
    example = flow_matching.build(stage, latents, draws, schedule)
    prompt = Prompt(batch['text'], batch['text_mask'], batch['pooled'])
    flow = predict_flow(jax_denoiser(apply, params), stage, example, prompt)
    return losses.squared_error(flow, example.flow)


def predict_flow(
    denoise: Denoiser, stage: int, example: flow_matching.Example, prompt: Prompt
) -> Float[Array, 'B 1 h w C']:
    """Return a denoiser's flow for a batch of examples."""
    return denoise(stage, example.history, example.x, example.unit, prompt, example.timestep)


def motion(latents: Float[np.ndarray, 'B T H W C']) -> float:
    """Return the mean absolute difference of neighboring frames."""
    return float(np.abs(np.diff(latents, axis=1)).mean())
