"""A small denoiser and the objectives of the step distillation in float64 NumPy, by loops over samples and pixels.

The JAX side is `Wave`. The NumPy side shares no code with the package but the sigmas of the schedule: pyramids are
means over loops, the clean prediction solves a linear system per block, and gradients by parameters are central
differences.

Legend: B batch, T latent frames, h w a stage's grid, C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from neodragon_jax.pyramid.schedule import Schedule

SCHEDULE = Schedule(spacing='even')
NAMES = ('gain', 'past', 'told', 'head')
STEP = 1e-6


class Wave:
    """A denoiser with four parameters: flow = head sin(gain x + past history + told (prompt + unit + timestep))."""

    def apply(self, variables, clips, text, mask, pooled, timestep, frame_ids):
        del text, mask
        p, x = variables['params'], clips[-1]
        history = sum((n + 1) * clip.mean(axis=(2, 3), keepdims=True) for n, clip in enumerate(clips[:-1]))
        told = pooled.mean(axis=1) + 0.1 * frame_ids[:, -1] + timestep / 1000
        return p['head'] * jnp.sin(p['gain'] * x + p['past'] * history + p['told'] * told.reshape(-1, 1, 1, 1, 1))


def wave(p: Mapping[str, Any], history, x, unit, pooled, timestep):
    """Return the flow of one sample: x [h, w, C], history a list of frames, numbers otherwise."""
    past = 0.0
    for number, frame in enumerate(history):
        past = past + (number + 1) * frame.mean(axis=(0, 1))
    told = pooled.mean() + 0.1 * unit + timestep / 1000
    return p['head'] * np.sin(p['gain'] * x + p['past'] * past + p['told'] * told)


def params(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(0.4, 1.2) for name in NAMES}


def halved(frame: np.ndarray) -> np.ndarray:
    height, width, channels = frame.shape
    small = np.zeros((height // 2, width // 2, channels))
    for row in range(height // 2):
        for column in range(width // 2):
            small[row, column] = frame[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(axis=(0, 1))
    return small


def doubled(frame: np.ndarray) -> np.ndarray:
    return np.kron(frame, np.ones((2, 2, 1)))


def at_stage(frame: np.ndarray, stage: int) -> np.ndarray:
    for _ in range(2 - stage):
        frame = halved(frame)
    return frame


def history_of(video: np.ndarray, unit: int, stage: int) -> list[np.ndarray]:
    """Return T - 1 frames, oldest first, zero before the video's start; a frame is coarser the older it is."""
    frames = []
    for distance in range(len(video) - 1, 0, -1):
        coarse = max(stage - distance + 1, 0)
        source = video[unit - distance] if unit >= distance else np.zeros_like(video[0])
        frames.append(at_stage(source, coarse))
    return frames


def ends(clean: np.ndarray, noise: np.ndarray, stage: int) -> tuple[np.ndarray, np.ndarray]:
    s0, s1 = float(SCHEDULE.start_sigmas[stage]), float(SCHEDULE.end_sigmas[stage])
    start = noise if stage == 0 else s0 * noise + (1 - s0) * doubled(halved(clean))
    return start, s1 * noise + (1 - s1) * clean


def timestep(stage: int, level: float) -> float:
    first, last = SCHEDULE.timestep_limits[stage]
    return last + (first - last) * level


def clean_of(x: np.ndarray, flow: np.ndarray, level: float, stage: int) -> np.ndarray:
    """Return the clean latent whose flow this is: per block of four pixels, solve for it."""
    s0, s1 = float(SCHEDULE.start_sigmas[stage]), float(SCHEDULE.end_sigmas[stage])
    y = x - ((1 - level) * s1 + level * s0) / (s0 - s1) * flow
    mean = np.full((4, 4), 1 / 4) if stage else np.zeros((4, 4))
    # y = (s0 (1 - s1) z - s1 (1 - s0) mean z) / (s0 - s1)
    matrix = (s0 * (1 - s1) * np.eye(4) - s1 * (1 - s0) * mean) / (s0 - s1)
    clean = np.zeros_like(y)
    for row in range(0, y.shape[0], 2):
        for column in range(0, y.shape[1], 2):
            block = y[row : row + 2, column : column + 2].reshape(4, -1)
            clean[row : row + 2, column : column + 2] = np.linalg.solve(matrix, block).reshape(2, 2, -1)
    return clean


class Row:
    """One sample of a batch with its random numbers, and a model's predictions on it."""

    def __init__(self, batch: Mapping[str, Any], index: int, stage: int, steps: int) -> None:
        take = lambda name: np.asarray(batch[name][index], np.float64)
        self.stage, self.steps, self.unit = stage, steps, int(batch['unit'][index])
        self.video, self.pooled = take('latents'), take('pooled')
        self.history = history_of(self.video, self.unit, stage)
        self.clean = self.target = at_stage(self.video[self.unit], stage)
        self.level = float(batch['level'][index]) if 'level' in batch else 1 - int(batch['index'][index]) / steps
        if 'start_0' in batch:
            start, end = self._path(take)
            self.target = clean_of(start, start - end, 1.0, stage)
        else:
            start, end = ends(self.clean, take('noise')[0], stage)
        self.x = self.level * start + (1 - self.level) * end
        self.draw = lambda name: take(name) if take(name).ndim == 0 else take(name)[0]

    def _path(self, take: Callable[[str], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return both ends of the stored path: the next stage's start is alpha Up(end) + noise of block mean 0."""
        start = take(f'start_{self.stage}')[self.unit]
        if self.stage == 2:
            return start, self.video[self.unit]
        alpha, _ = SCHEDULE.upsample_coefficients(self.stage + 1)
        return start, halved(take(f'start_{self.stage + 1}')[self.unit]) / alpha

    def flow(self, p: Mapping[str, Any], x: np.ndarray, level: float) -> np.ndarray:
        return wave(p, self.history, x, self.unit, self.pooled, timestep(self.stage, level))

    def guided(self, p: Mapping[str, Any], x: np.ndarray, level: float, negative: np.ndarray, scale: float):
        away = wave(p, self.history, x, self.unit, negative, timestep(self.stage, level))
        return away + scale * (self.flow(p, x, level) - away)

    def z_theta(self, p: Mapping[str, Any]) -> np.ndarray:
        return clean_of(self.x, self.flow(p, self.x, self.level), self.level, self.stage)

    def probe(self, clean: np.ndarray, tau: float, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return z_tau and its flow."""
        y0, y1 = ends(clean, noise, self.stage)
        return tau * y0 + (1 - tau) * y1, y0 - y1


def cauchy(difference: np.ndarray) -> float:
    return float(np.log(1 + np.sum(difference**2)))


def slopes(loss: Callable[[Mapping[str, Any]], float], p: Mapping[str, Any]) -> dict[str, float]:
    """Return the derivative of a loss by every parameter, by central differences."""
    moved = lambda name, step: loss({**p, name: p[name] + step})
    return {name: (moved(name, STEP) - moved(name, -STEP)) / (2 * STEP) for name in p}


@functools.cache
def paths(batch: int, frames: int, grid: int, channels: int) -> dict[str, np.ndarray]:
    """Return random stage starts as a sample stores them."""
    rng = np.random.default_rng(3)
    return {
        f'start_{stage}': rng.standard_normal((batch, frames, grid >> (2 - stage), grid >> (2 - stage), channels))
        for stage in range(3)
    }
