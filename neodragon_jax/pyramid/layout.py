"""Order of the tokens in one denoiser sequence, their position ids, and the attention mask.

A sequence is: text tokens, then the patches of every latent frame, oldest first; the last frames are the current unit.
Legend: B batch, F latent frames in the sequence, L text tokens, I image tokens, S = L + I, H W latent grid, C channels.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from neodragon_jax.base.errors import InputError

# Added to forbidden scores. Finite, because infinities turn a fully padded row into NaN.
FORBIDDEN = -1e9


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static shape of a sequence.

    Attributes:
      text_tokens: L.
      grids: patches (rows, columns) of every latent frame, oldest first.
      current_frames: number of last frames that form the current unit.
      text_sees_current: whether the current unit may be frame 0 of the video, the only frame that text attends to.
        Attention by key prefixes then takes current keys into account for text as well.
    """

    text_tokens: int
    grids: tuple[tuple[int, int], ...]
    current_frames: int = 1
    text_sees_current: bool = True

    @functools.cached_property
    def frame_of_token(self) -> np.ndarray:
        """Index into `grids` of every image token, [I]."""
        return np.repeat(np.arange(len(self.grids)), [rows * columns for rows, columns in self.grids])

    @property
    def image_tokens(self) -> int:
        """I, history and current."""
        return len(self.frame_of_token)

    @property
    def current_tokens(self) -> int:
        """Image tokens of the current unit."""
        return sum(rows * columns for rows, columns in self.grids[-self.current_frames :])

    @property
    def tokens(self) -> int:
        """S, text included."""
        return self.text_tokens + self.image_tokens

    @property
    def equal_run(self) -> int:
        """Image tokens in the longest run that divides every frame: tokens of a run have one position."""
        return math.gcd(*(rows * columns for rows, columns in self.grids))


class QueryGroup(NamedTuple):
    """Image queries that see the same prefix of the keys, apart from the order of the frames among themselves.

    Attributes:
      start, stop: range of image tokens.
      frames: number of latent frames in the range.
      keys: length of the prefix, text included.
    """

    start: int
    stop: int
    frames: int
    keys: int


def query_groups(layout: Layout) -> list[QueryGroup]:
    """Group the image queries in order: neighbors of the same grid form a group, the current unit another.

    Attention is causal over frames, so no query of a group sees a key after the group. Grouping equal frames (the
    coarse history) gives fewer and larger matrix products, at the cost of a few masked scores.
    """
    past = len(layout.grids) - layout.current_frames
    groups: list[QueryGroup] = []
    start = 0
    for _, frames in itertools.groupby(enumerate(layout.grids), key=lambda frame: (frame[0] >= past, frame[1])):
        sizes = [rows * columns for _, (rows, columns) in frames]
        stop = start + sum(sizes)
        groups.append(QueryGroup(start, stop, len(sizes), layout.text_tokens + stop))
        start = stop
    return groups


def layout_of(clips: Sequence[Float[Array, 'B _ _ _ C']], patch: int, text_tokens: int) -> Layout:
    """Return the layout of clips given oldest first; the last clip is the current unit.

    Raises:
      InputError: there is no clip, or a clip is not divisible into patches.
    """
    if not clips:
        raise InputError('no clips given; the current unit must be the last element of the list.')
    grids: list[tuple[int, int]] = []
    for number, clip in enumerate(clips):
        frames, height, width = clip.shape[1:4]
        if height % patch or width % patch:
            raise InputError(
                f'clip {number} is {height}x{width}; height and width must be divisible by the patch {patch}.'
            )
        grids += [(height // patch, width // patch)] * frames
    return Layout(text_tokens, tuple(grids), clips[-1].shape[1])


def patchify(clip: Float[Array, 'B T H W C'], patch: int) -> Float[Array, 'B I P']:
    """Cut frames into patches: tokens in t, row, column order; numbers of a patch in row, column, channel order."""
    batch, frames, height, width, channels = clip.shape
    x = clip.reshape(batch, frames, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: Float[Array, 'B I P'], patch: int, grid: tuple[int, int]) -> Float[Array, 'B T H W C']:
    """Undo `patchify` for frames of `grid` patches."""
    batch, rows, columns = tokens.shape[0], *grid
    x = tokens.reshape(batch, -1, rows, columns, patch, patch, tokens.shape[-1] // patch**2)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(batch, x.shape[1], rows * patch, columns * patch, -1)


def position_ids(layout: Layout, frame_ids: Int[Array, 'B F']) -> Int[Array, 'B S']:
    """Return the temporal position of every token: 0 for text, the frame's index in the video for patches.

    Negative frame ids mark padding frames; they stay negative here.
    """
    text = jnp.zeros((frame_ids.shape[0], layout.text_tokens), frame_ids.dtype)
    return jnp.concatenate([text, frame_ids[:, layout.frame_of_token]], axis=1)


def valid_tokens(ids: Int[Array, 'B S'], text_mask: Int[Array, 'B L']) -> Bool[Array, 'B S']:
    """Return False for padding: text tokens whose `text_mask` is 0, and frames with negative ids."""
    return jnp.concatenate([text_mask.astype(bool), ids[:, text_mask.shape[1] :] >= 0], axis=1)


def attention_mask(ids: Int[Array, 'B S'], text_mask: Int[Array, 'B L']) -> Bool[Array, 'B 1 S S']:
    """Return True where query i may attend to key j: both valid (or both padding), and id_i >= id_j.

    Padding sees only padding, so that no row is empty.
    Source: arXiv 2410.05954, section 3.4 (blockwise causal attention).
    """
    valid = valid_tokens(ids, text_mask)
    same = valid[:, :, None] == valid[:, None, :]
    return (same & (ids[:, :, None] >= ids[:, None, :]))[:, None]


def attention_bias(mask: Bool[Array, '*B'], forbidden: float = FORBIDDEN) -> Float[Array, '*B']:
    """Return a mask as an addend of the scores: 0 where allowed, `forbidden` elsewhere."""
    return jnp.where(mask, 0.0, forbidden).astype(jnp.float32)
