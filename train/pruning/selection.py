"""Greedy choice of the blocks to remove, measured on sampled videos.

The least important blocks are candidates. Each round removes the candidate whose removal changes the videos least,
compared with the full denoiser's videos of the same prompts and noise.

Source: Neodragon, arXiv 2511.06055, section on block pruning; the greedy order is specific to this project.
Legend: B batch, T latent frames, H W latent grid, C channels, K blocks but the last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from neodragon_jax.base.errors import InputError
from neodragon_jax.generation import pipeline
from neodragon_jax.generation.devices import Spread
from neodragon_jax.pyramid.sampler import (
    Denoiser,
    DrawnNoise,
    History,
    Latents,
    Plan,
    Prompt,
    Unit,
    guided,
    jax_denoiser,
    sample,
)
from train.flow.guidance import scale_by_unit
from train.pruning.features import observer, with_features
from train.pruning.importance import Importance, block_cosines
from train.pruning.keep_list import prune

# keep list -> distance of the pruned denoiser's videos from the full denoiser's
Distance = Callable[[tuple[int, ...]], float]


class Round(NamedTuple):
    """One round of the greedy choice: the removed block, and the distance without each candidate."""

    removed: int
    distance: float
    tried: dict[int, float]


@dataclasses.dataclass
class Subject:
    """A denoiser, and the prompts of its videos.

    Attributes:
      module: the denoiser, scanned.
      params: its parameters, stacked, on the devices.
      texts: the prompts, from which the noise is derived.
      prompts: embeddings of the prompts, on the host.
      negative: embedding of the negative prompt, without a batch axis.
      guidance, first_guidance: guidance scales for units > 0 and for unit 0.
      size: videos per call.
    """

    module: Any
    params: Any
    texts: Sequence[str]
    prompts: Prompt
    negative: Prompt
    plan: Plan
    guidance: float
    first_guidance: float
    seed: int
    size: int
    spread: Spread
    _denoisers: dict[int, Denoiser] = dataclasses.field(default_factory=dict)
    _current: Any = None
    _watched: Any = None

    @property
    def blocks(self) -> int:
        return self.module.config.num_layers

    def videos(self, keep: Sequence[int], tasks: Sequence[tuple[int, int]]) -> Float[np.ndarray, 'B T H W C']:
        """Return latents sampled with only the kept blocks.

        Args:
          tasks: at most `size` pairs (prompt index, sample index), which with the seed determine the noise.
        """
        module, self._current = prune(self.module, self.params, keep)
        if len(keep) not in self._denoisers:
            # Denoisers with the same number of blocks share one compiled function, with the parameters as arguments.
            self._denoisers[len(keep)] = jax_denoiser(module.apply, lambda: self._current)
        latents = jax.device_get(self._sample(self._denoisers[len(keep)], tasks))
        self._current = None
        return latents[: len(tasks)]

    def cosines(
        self, tasks: Sequence[tuple[int, int]]
    ) -> tuple[Float[np.ndarray, ' K+1'], Float[np.ndarray, ' K'], int]:
        """Return the sums of all blocks' cosines over the calls of some videos (image, text), and the number of calls.

        A guided call counts twice: with the prompt and with the negative prompt.
        """
        if self._watched is None:
            self._watched = observer(_with_cosines(self.module), self.params)
        weights = np.repeat(np.arange(self.size) < len(tasks), 2).astype(np.float32)
        recorder = _Recorder(self._watched, self.spread.shard(jnp.asarray(weights)))
        self._sample(recorder, tasks)
        image, text = jax.device_get(recorder.sums)
        return image, text, 2 * len(tasks) * recorder.calls

    def _sample(self, denoise: Denoiser, tasks: Sequence[tuple[int, int]]) -> Latents:
        tasks = [*tasks, *[tasks[-1]] * (self.size - len(tasks))]
        rows = [prompt for prompt, _ in tasks]
        prompt = self.spread.shard(jax.tree.map(lambda leaf: jnp.asarray(leaf[np.asarray(rows)]), self.prompts))
        keys = pipeline.sample_keys(self.seed, [self.texts[row] for row in rows], [number for _, number in tasks])
        scale = scale_by_unit(self.guidance, self.first_guidance)
        noise = DrawnNoise(self.spread.shard(keys), self.plan.schedule)
        return sample(guided(denoise, self.negative, scale), self.plan, prompt, noise)


def _with_cosines(module: Any) -> Callable[..., tuple[Array, tuple[Array, Array]]]:
    """Return `apply` of a denoiser as a function that returns (flow, cosines of its blocks)."""
    apply = with_features(module)

    def watched(*arguments: Any) -> tuple[Array, tuple[Array, Array]]:
        flow, features = apply(*arguments)
        return flow, block_cosines(features)

    return watched


class _Recorder:
    """Denoiser wrapper that sums the cosines of its calls."""

    def __init__(self, denoise: Any, weights: Float[Array, ' B']) -> None:
        self._denoise, self._weights = denoise, weights
        self.sums: Any = None
        self.calls = 0

    def __call__(self, stage: int, history: History, x: Unit, unit: Array, prompt: Prompt, timestep: Array) -> Unit:
        flow, cosines = self._denoise(stage, history, x, unit, prompt, timestep)
        sums = jax.tree.map(lambda values: values @ self._weights, cosines)
        self.sums = sums if self.sums is None else jax.tree.map(jnp.add, self.sums, sums)
        self.calls += 1
        return flow


def difference(videos: Float[np.ndarray, 'B ...'], reference: Float[np.ndarray, 'B ...']) -> float:
    """Return |videos - reference| / |reference| in the Euclidean norm, mean over the videos."""
    axes = tuple(range(1, reference.ndim))
    videos, reference = np.asarray(videos, np.float64), np.asarray(reference, np.float64)
    norm = lambda x: np.sqrt(np.sum(np.square(x), axis=axes))
    return float(np.mean(norm(videos - reference) / np.maximum(norm(reference), 1e-30)))


def choose(importance: Importance, remove: int, candidates: int, distance: Distance) -> list[Round]:
    """Return the rounds of the greedy choice.

    Args:
      remove: blocks to remove, one in each round.
      candidates: number of least important blocks that may be removed.
    """
    pool, keep, rounds = importance.order()[:candidates], tuple(range(importance.blocks)), []
    for _ in range(remove):
        without = lambda block, keep=keep: tuple(kept for kept in keep if kept != block)
        tried = {block: distance(without(block)) for block in pool}
        removed = min(pool, key=lambda block: (tried[block], block))
        rounds.append(Round(removed, tried[removed], tried))
        pool, keep = [block for block in pool if block != removed], without(removed)
    return rounds


def check_choice(blocks: int, remove: int, candidates: int) -> None:
    """Raise InputError unless a denoiser with that many blocks allows this choice."""
    removable = blocks - 1
    if not 1 <= remove <= removable:
        raise InputError(f'--remove {remove}: the denoiser has {removable} removable blocks; give 1 to {removable}.')
    if not remove <= candidates <= removable:
        raise InputError(
            f'--candidates {candidates}: give a number from {remove} (--remove) to {removable} (the removable blocks).'
        )
