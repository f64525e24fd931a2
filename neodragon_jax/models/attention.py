"""Joint attention of the text and the image stream: the strategies that apply the mask.

Attention is causal over frames: a query sees the text and the frames up to its own. All strategies give the same
output at real tokens; their outputs at padding differ and are never read.

  masked          Score every query against every key and add a mask to the scores.
  prefix          Score each group of image queries against only the prefix of the keys that it may see. A bias row
                  added to the scores forbids the other keys of the prefix, mostly padding.
  prefix_folded   Use the same groups, but forbid keys inside the contraction: queries and keys get additional
                  dimensions whose product is very negative. The scores are then written once and read once; on a
                  phone, this memory traffic bounds attention.
  splash          Forbid keys inside the contraction of one TPU kernel for all queries, which never writes the scores to
                  memory; for training.

A strategy is two functions: `bias` turns layout, positions and text mask into arrays once per condition, and `attend`
uses them in every block. To add a strategy, add a row to `STRATEGIES`.

Legend: B batch, L text tokens, I image tokens, S = L + I, X image tokens whose output is read (the last ones), N heads,
K head dim, F dimensions that hold the mask.
Source: arXiv 2410.05954, section 3.4 (blockwise causal attention).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from neodragon_jax.base.errors import InputError, did_you_mean
from neodragon_jax.models import splash
from neodragon_jax.models.heads import HeadOrder
from neodragon_jax.models.layers import last_entries
from neodragon_jax.models.operands import Heads
from neodragon_jax.models.rotary import Rotary
from neodragon_jax.pyramid.layout import (
    Layout,
    QueryGroup,
    attention_bias,
    attention_mask,
    query_groups,
    valid_tokens,
)

# The product of these factors is added to a forbidden score. exp(-100) is negligible, and neither factor widens the
# value range of its tensor much.
QUERY_FEATURE, KEY_FEATURE = 4.0, -25.0
# The same for training, where weights may grow and no range is quantized: exp(-1024) is 0.
QUERY_HIDES, KEY_HIDES = 32.0, -32.0


class Queries(NamedTuple):
    """Scaled queries of the two streams, the image's rotated; `text` is None if its output is not used."""

    text: Float[Array, 'B L N K'] | None
    image: Float[Array, 'B X N K']


# Output of text, or None, and of the image: in ROWS [B, L, N*K] and [B, X, N*K]; in LANES [B, N, L, K], [B, N, X, K].
Attended = tuple[Array | None, Array]


class Strategy(NamedTuple):
    """A way to apply the mask.

    Attributes:
      bias: (layout, position ids [B, S], text mask [B, L], heads) -> any tree of arrays.
      attend: returns Attended. In ROWS its arguments are queries, keys [B, S, N, K] and values [B, S, N, K], in which
        text comes first, and that tree. In LANES they are the `operands.Heads` of queries, keys and values, the rotary
        embedding, and that tree: norm and rotation are a part of the kernel's operands.
      order: of the axes of heads.
    """

    bias: Callable[[Layout, Array, Array, int], Any]
    attend: Callable[..., Attended]
    order: HeadOrder = HeadOrder.ROWS


def strategy(name: str) -> Strategy:
    """Return a strategy by its name.

    Raises:
      InputError: no strategy has that name.
    """
    if name not in STRATEGIES:
        raise InputError(
            f'attention is {name!r}.{did_you_mean(name, STRATEGIES)} Use one of {", ".join(sorted(STRATEGIES))}.'
        )
    return STRATEGIES[name]


def with_forward_mode(name: str) -> str:
    """Return a strategy that `jax.jvp` differentiates: this one, or `masked` for one that is a kernel."""
    return 'masked' if strategy(name).order is HeadOrder.LANES else name


def _masked_bias(layout: Layout, ids: Array, text_mask: Array, heads: int) -> Float[Array, 'B 1 S S']:
    del layout, heads
    return attention_bias(attention_mask(ids, text_mask))


def _attend_masked(queries: Queries, key: Array, value: Array, bias: Float[Array, '#B 1 S S']) -> Attended:
    query = queries.image if queries.text is None else jnp.concatenate([queries.text, queries.image], axis=1)
    bias = last_entries(bias, query.shape[1], axis=2)
    out = _merge_heads(_weigh(query.swapaxes(1, 2), key.transpose(0, 2, 3, 1), value.swapaxes(1, 2), bias))
    if queries.text is None:
        return None, out
    length = queries.text.shape[1]
    return out[:, :length], out[:, length:]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Groups:
    """Prefix of the keys that each group of queries sees: static, but part of the tree of a bias.

    Attributes:
      text_keys: prefix that text sees.
      image: groups of image queries.
    """

    text_keys: int
    image: tuple[QueryGroup, ...]

    @classmethod
    def of(cls, layout: Layout) -> Groups:
        """Return the groups of a sequence whose frames are sorted by id."""
        unseen = 0 if layout.text_sees_current else layout.current_tokens
        return cls(layout.tokens - unseen, tuple(query_groups(layout)))


class PrefixBias(NamedTuple):
    """Addends of the scores: of text, [B, 1, 1, keys]; of each group of image queries, [B, 1, 1 or rows, keys]."""

    groups: Groups
    text: Array
    image: tuple[Array, ...]


class FoldedBias(NamedTuple):
    """The content of a PrefixBias as a product: additional dimensions of queries and keys, the same for all heads."""

    groups: Groups
    text_query: Float[Array, 'B L N F']
    image_query: Float[Array, 'B I N F']
    key: Float[Array, 'B S N F']


class SplashBias(NamedTuple):
    """Additional dimensions of queries and keys, the latter padded to whole tiles."""

    query: Float[Array, 'B 1 F S']
    key: Float[Array, 'B 1 F _']


def _seen_by_text(ids: Int[Array, 'B S']) -> Bool[Array, 'B S']:
    """Return the keys that text sees: text itself (position 0) and frame 0, wherever it is in the sequence."""
    return ids <= 0


def _prefix_bias(layout: Layout, ids: Array, text_mask: Array, heads: int) -> PrefixBias:
    del heads
    groups, valid = Groups.of(layout), valid_tokens(ids, text_mask)[:, None, None]
    text = attention_bias(valid & _seen_by_text(ids)[:, None, None])[..., : groups.text_keys]
    frames = np.concatenate([np.full(layout.text_tokens, -1), layout.frame_of_token])
    image = []
    for start, stop, count, keys in groups.image:
        mask = valid[..., :keys]
        if count > 1:
            mask &= layout.frame_of_token[start:stop, None] >= frames[:keys]
        image.append(attention_bias(mask))
    return PrefixBias(groups, text, tuple(image))


def _attend_prefix(queries: Queries, key: Array, value: Array, bias: PrefixBias) -> Attended:
    return _attend_groups(queries, key, value, bias.groups, bias.text, bias.image)


# Query and key side of one additional dimension, [S] or [B, S]: a score is forbidden where both are set.
Column = tuple[Any, Any]


def _hidden_always(layout: Layout, ids: Array, text_mask: Array) -> list[Column]:
    """Return columns that hide padding from all, and the frames after the first from text."""
    is_text = np.arange(layout.tokens) < layout.text_tokens
    return [
        (np.ones(layout.tokens), ~valid_tokens(ids, text_mask)),
        (is_text, ~is_text & ~_seen_by_text(ids)),
    ]


def _hidden_later(layout: Layout, start: int, stop: int) -> list[Column]:
    """Return columns that hide each frame of the image tokens start..stop but the first from the earlier ones."""
    frames, columns = layout.frame_of_token[start:stop], []
    for frame in range(frames[0] + 1, frames[-1] + 1):
        earlier, same = np.zeros((2, layout.tokens))
        earlier[layout.text_tokens + start : layout.text_tokens + stop] = frames < frame
        same[layout.text_tokens + start : layout.text_tokens + stop] = frames == frame
        columns.append((earlier, same))
    return columns


def _sides(columns: Sequence[Column], shape: tuple[int, ...]) -> tuple[list[Array], list[Array]]:
    """Return the query and the key side of columns, each [B, S]."""
    spread = lambda side: jnp.broadcast_to(jnp.asarray(side, jnp.float32), shape)
    return [spread(query) for query, _ in columns], [spread(key) for _, key in columns]


def _folded_bias(layout: Layout, ids: Array, text_mask: Array, heads: int) -> FoldedBias:
    """Return dimensions for padding, for frames that text does not see, and for each frame of a group but its first."""
    groups, length = Groups.of(layout), layout.text_tokens
    columns = _hidden_always(layout, ids, text_mask)
    for start, stop, _, _ in groups.image:
        columns += _hidden_later(layout, start, stop)
    heads_of = lambda rows: jnp.broadcast_to(jnp.stack(rows, axis=-1)[:, :, None], (*ids.shape, heads, len(columns)))
    query, key = (heads_of(rows) for rows in _sides(columns, ids.shape))
    query = QUERY_FEATURE * query
    return FoldedBias(groups, query[:, :length], query[:, length:], KEY_FEATURE * key)


def _attend_folded(queries: Queries, key: Array, value: Array, bias: FoldedBias) -> Attended:
    extend = lambda x, more: jnp.concatenate([x, last_entries(more, x.shape[1], axis=1).astype(x.dtype)], axis=-1)
    text = None if queries.text is None else extend(queries.text, bias.text_query)
    queries = Queries(text, extend(queries.image, bias.image_query))
    nothing = (None,) * len(bias.groups.image)
    return _attend_groups(queries, extend(key, bias.key), value, bias.groups, None, nothing)


def _splash_bias(layout: Layout, ids: Array, text_mask: Array, heads: int) -> SplashBias:
    del heads
    padding = splash.tiles(layout.tokens)[0] - layout.tokens
    columns = [*_hidden_always(layout, ids, text_mask), *_hidden_later(layout, 0, layout.image_tokens)]
    query, key = (jnp.stack(rows, axis=1)[:, None] for rows in _sides(columns, ids.shape))
    # Tokens behind the sequence are padding too.
    behind = jnp.zeros((*key.shape[:3], padding)).at[:, :, 0].set(1)
    return SplashBias(QUERY_HIDES * query, KEY_HIDES * jnp.concatenate([key, behind], axis=3))


def _attend_splash(queries: Heads, keys: Heads, values: Heads, rotary: Rotary, bias: SplashBias) -> Attended:
    out = splash.attend(queries, keys, values, rotary, *bias)
    if queries.text is None:
        return None, out
    length = queries.text.shape[3]
    return out[:, :, :length], out[:, :, length:]


def _attend_groups(
    queries: Queries,
    key: Float[Array, 'B S N _'],
    value: Float[Array, 'B S N K'],
    groups: Groups,
    text_bias: Array | None,
    image_biases: Sequence[Array | None],
) -> Attended:
    """Attend with each group of queries to its prefix of the keys."""
    tokens = key.shape[1]
    prefixes = {tokens: (key.transpose(0, 2, 3, 1), value.swapaxes(1, 2))}

    def attend(query: Array, keys: int, bias: Array | None) -> Float[Array, 'B N _ K']:
        if keys not in prefixes:  # groups with the same prefix share a slice
            prefixes[keys] = prefixes[tokens][0][..., :keys], prefixes[tokens][1][:, :, :keys]
        return _weigh(query, *prefixes[keys], bias)

    text_out = None
    if queries.text is not None:
        text_out = _merge_heads(attend(queries.text.swapaxes(1, 2), groups.text_keys, text_bias))
    query = queries.image.swapaxes(1, 2)  # B N X K
    skipped = groups.image[-1].stop - query.shape[2]
    outs = []
    for (start, stop, _, keys), bias in zip(groups.image, image_biases, strict=True):
        start, stop = max(start - skipped, 0), stop - skipped
        if stop > 0:
            rows = query if stop - start == query.shape[2] else query[:, :, start:stop]
            outs.append(attend(rows, keys, _bias_rows(bias, stop - start)))
    return text_out, _merge_heads(outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=2))


def _bias_rows(bias: Array | None, rows: int) -> Array | None:
    """Return the last rows of a bias that has rows."""
    return bias if bias is None or bias.shape[2] == 1 else last_entries(bias, rows, axis=2)


def _weigh(query: Array, key: Array, value: Array, bias: Array | None) -> Float[Array, 'B N _ K']:
    """Return the attention-weighted values, softmax(query key + bias) value; scores and softmax in float32."""
    scores = jnp.matmul(query, key, preferred_element_type=jnp.float32)  # B N L S
    weights = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)
    return jnp.matmul(weights.astype(value.dtype), value)


def _merge_heads(x: Float[Array, 'B N L K']) -> Float[Array, 'B L N*K']:
    """Concatenate the heads of each token."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1)


STRATEGIES: dict[str, Strategy] = {
    'masked': Strategy(_masked_bias, _attend_masked),
    'prefix': Strategy(_prefix_bias, _attend_prefix),
    'prefix_folded': Strategy(_folded_bias, _attend_folded),
    'splash': Strategy(_splash_bias, _attend_splash, HeadOrder.LANES),
}
