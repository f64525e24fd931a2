"""Attention over prefixes on TPUs by the Pallas splash kernel, which never writes the scores to memory.

In a sequence that is causal over frames every image token sees a prefix of the keys: the text and the frames up to its
own. The kernel computes that mask from one number per row, and the padding mask from two segments, valid and padding.
On other devices than TPUs the kernel is interpreted: correct but slow, for tests only.

Legend: B batch, S tokens, X image tokens whose output is wanted (the last ones), N heads, K head dim.
Source: arXiv 2205.14135 (attention in tiles); `jax.experimental.pallas.ops.tpu.splash_attention`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from neodragon_jax.models.mesh import HEADS_AXIS, batch_axes
from neodragon_jax.pyramid.layout import Layout

# Tiles are multiples of a vector register's lanes, and their scores must fit a core's vector memory in float32.
LANES, LONGEST_TILE = 128, 1024


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Prefixes:
    """Number of keys that each image token sees: static, but part of the tree of a bias."""

    keys: tuple[int, ...]

    @classmethod
    def of(cls, layout: Layout) -> Prefixes:
        """Return the prefixes of a sequence whose frames are sorted by id."""
        ends = layout.text_tokens + np.cumsum([rows * columns for rows, columns in layout.grids])
        return cls(tuple(ends[layout.frame_of_token].tolist()))


def attend_prefixes(
    query: Float[Array, 'B N X K'],
    key: Float[Array, 'B N S K'],
    value: Float[Array, 'B N S K'],
    valid: Bool[Array, 'B S'],
    prefixes: Prefixes,
) -> Float[Array, 'B N X K']:
    """Attend with the last X image tokens to their prefixes; on a mesh each device computes its samples and heads.

    Args:
      query: scaled.
      valid: False for padding, which only sees padding.
    """
    local = functools.partial(_attend, ends=np.array(prefixes.keys[-query.shape[2] :], np.int32))
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # The partitioner cannot look into a kernel.
        batch = batch_axes()
        heads = PartitionSpec(batch, HEADS_AXIS if HEADS_AXIS in mesh.axis_names else None)
        specs = (heads, heads, heads, PartitionSpec(batch))
        local = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return local(query, key, value, valid.astype(jnp.int32))


def _block_sizes(row_tile: int, key_tile: int, keys: int) -> Any:
    """Return the kernel's tiles and layouts.

    All keys form one block, computed tile by tile, so that the kernel itself sums the gradient of the queries.
    """
    layout = pallas.QKVLayout.SEQ_MINOR  # the output projection then needs only a plain transpose
    return pallas.BlockSizes(
        block_q=row_tile,
        block_kv=keys,
        block_kv_compute=key_tile,
        block_q_dkv=row_tile,
        block_kv_dkv=keys,
        block_kv_dkv_compute=key_tile,
        use_fused_bwd_kernel=True,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )


def _attend(
    query: Float[Array, 'B N X K'],
    key: Float[Array, 'B N S K'],
    value: Float[Array, 'B N S K'],
    segments: Int[Array, 'B S'],
    ends: np.ndarray,
) -> Float[Array, 'B N X K']:
    """Run the kernel on whole tiles: padded keys come after every prefix, padded rows are cut off again."""
    rows, keys = query.shape[2], key.shape[2]
    (padded_rows, row_tile), (padded_keys, key_tile) = tiles(rows), tiles(keys)
    causal = pallas.CausalMask((padded_rows, padded_keys))
    # Row i sees keys 0..q_sequence[i]. A padded row sees them all: one without any would divide by zero.
    causal.q_sequence = np.pad(ends, (0, padded_rows - rows), constant_values=padded_keys).astype(np.int32) - 1
    sizes = _block_sizes(row_tile, key_tile, padded_keys)

    def attend(interpret: bool, *arrays: Any) -> Array:
        mask = pallas.MultiHeadMask([causal] * query.shape[1])
        kernel = pallas.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        out: Any = jax.vmap(kernel)(*arrays)
        return out

    pad = lambda x, length: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])
    ids = pallas.SegmentIds(pad(segments[:, -rows:], padded_rows), pad(segments, padded_keys))
    lengthen = lambda x, length: jnp.pad(x, [(0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)])
    operands = lengthen(query, padded_rows), lengthen(key, padded_keys), lengthen(value, padded_keys), ids
    on_tpu, elsewhere = functools.partial(attend, False), functools.partial(attend, True)
    out = jax.lax.platform_dependent(*operands, tpu=on_tpu, default=elsewhere)
    return out[:, :, :rows].astype(value.dtype)


def tiles(length: int) -> tuple[int, int]:
    """Return (padded length, tile): the fewest equal tiles of at most LONGEST_TILE that hold `length` tokens."""
    count = math.ceil(length / LONGEST_TILE)
    tile = math.ceil(length / (count * LANES)) * LANES
    return count * tile, tile
