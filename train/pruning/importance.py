"""Importance of a denoiser's blocks, by their change of the tokens: the criterion of block pruning.

    importance of block k = 1 - E[cos(tokens before k, tokens after k)], for each of the two token streams

The mean is over valid tokens, over the denoiser calls of a sampled video, and over videos. An identity block has
importance 0. The last block outputs no text, and its image score is that of the current unit's tokens.

Source: Neodragon, arXiv 2511.06055, section on block pruning (100 prompts, 5 samples each).
Legend: B batch, K blocks but the last, N tokens of a stream, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from train.pruning.features import Features

_SMALLEST_NORMS = 1e-16


def mean_cosine(
    before: Float[Array, 'B N D'], after: Float[Array, 'B N D'], mask: Num[Array, 'B N']
) -> Float[Array, ' B']:
    """Return the cosine between tokens before and after a block, mean over each sample's valid tokens, in float32."""
    before, after = before.astype(jnp.float32), after.astype(jnp.float32)
    squares = jnp.sum(jnp.square(before), axis=-1) * jnp.sum(jnp.square(after), axis=-1)
    cosine = jnp.sum(before * after, axis=-1) * jax.lax.rsqrt(jnp.maximum(squares, _SMALLEST_NORMS))
    valid = (mask != 0).astype(jnp.float32)
    return jnp.sum(cosine * valid, axis=-1) / jnp.maximum(jnp.sum(valid, axis=-1), 1)


def block_cosines(features: Features) -> tuple[Float[Array, 'K+1 B'], Float[Array, 'K B']]:
    """Return (image, text): the mean cosine of every block, by sample."""

    def stream(first: Array, after: Array, mask: Array) -> Array:
        before_first = mean_cosine(first, after[0], mask)[None]
        later = jax.vmap(mean_cosine, in_axes=(0, 0, None))(after[:-1], after[1:], mask)
        return jnp.concatenate([before_first, later])

    before_last = features.after.image[-1] if len(features.after.image) else features.first.image
    current = features.last.shape[1]
    last = mean_cosine(before_last[:, -current:], features.last, jnp.ones(features.last.shape[:2]))[None]
    if not len(features.after.image):
        return last, jnp.zeros((0, last.shape[1]))
    image = stream(features.first.image, features.after.image, features.image_mask)
    text = stream(features.first.text, features.after.text, features.text_mask)
    return jnp.concatenate([image, last]), text


@dataclasses.dataclass(frozen=True)
class Importance:
    """Scores of all blocks; the last block has no text score."""

    image: Float[np.ndarray, ' K+1']
    text: Float[np.ndarray, ' K']

    @property
    def blocks(self) -> int:
        return len(self.image)

    def order(self) -> list[int]:
        """Return the blocks that may be removed, least important first, by the mean of their ranks on both streams.

        The streams' scores are not comparable, and the paper finds them uncorrelated. Ties keep the order of blocks.
        """
        ranks = _ranks(self.image[:-1]) + _ranks(self.text)
        return [int(block) for block in np.argsort(ranks, kind='stable')]

    def correlation(self) -> dict[str, float | None]:
        """Return Pearson's and Spearman's correlation of the two streams' scores; None if one is constant."""
        image, text = self.image[:-1], self.text
        pairs = {'pearson': (image, text), 'spearman': (_ranks(image), _ranks(text))}
        return {name: _correlation(*pair) for name, pair in pairs.items()}

    def to_json(self) -> dict[str, Any]:
        """Return scores, order and correlation."""
        scores = {'image': self.image.tolist(), 'text': [*self.text.tolist(), None]}
        return scores | {'order': self.order(), 'correlation': self.correlation()}

    def table(self) -> str:
        """Return a table with a row per block: its scores, and its rank from the least important."""
        order = self.order()
        lines = ['block   image    text  place']
        for block in range(self.blocks - 1):
            place = order.index(block) + 1
            lines.append(f'{block:5d}  {self.image[block]:.4f}  {self.text[block]:.4f}  {place:5d}')
        lines.append(f'{self.blocks - 1:5d}  {self.image[-1]:.4f}       -   stays')
        told = [f'{name} {"-" if r is None else f"{r:.2f}"}' for name, r in self.correlation().items()]
        return '\n'.join([*lines, f'correlation of the two streams: {", ".join(told)}'])


def _ranks(values: Float[np.ndarray, ' K']) -> Float[np.ndarray, ' K']:
    """Return the rank of each value, from 0; ties get their mean rank."""
    below = (values[None] < values[:, None]).sum(axis=1)
    equal = (values[None] == values[:, None]).sum(axis=1)
    return below + (equal - 1) / 2


def _correlation(a: Float[np.ndarray, ' K'], b: Float[np.ndarray, ' K']) -> float | None:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
