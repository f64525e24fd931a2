"""Attention on TPUs by the Pallas splash kernel, which never writes the scores to memory.

Keys are hidden by additional dimensions of queries and keys whose product is very negative. At a head dimension of 64,
which fills half of a matrix unit, they cost nothing, while a mask inside the kernel costs several operations per score.
On other devices than TPUs the kernel is interpreted: correct but slow, for tests only.

Legend: B batch, S tokens, R tokens whose output is wanted (the last ones), N heads, K head dim, F dimensions that hide,
P keys padded to whole tiles.
Source: arXiv 2205.14135 (attention in tiles); `jax.experimental.pallas.ops.tpu.splash_attention`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from neodragon_jax.models.heads import QK_NORM_EPSILON
from neodragon_jax.models.layers import last_entries
from neodragon_jax.models.mesh import HEADS_AXIS, batch_axes
from neodragon_jax.models.operands import Form, Heads, place_normed, place_values
from neodragon_jax.models.rotary import Rotary

# Tiles are multiples of a vector register's lanes, and their scores must fit a core's vector memory in float32.
REGISTER, LONGEST_TILE = 128, 1024
# Dimensions that hide are filled with zeros to a multiple of this: a register holds 16 rows of bfloat16.
FEATURES = 16
# Name of the kernel's output for policies of rematerialization.
OUTPUT = 'attention'


def attend(
    queries: Heads,
    keys: Heads,
    values: Heads,
    rotary: Rotary,
    query_hides: Float[Array, 'B 1 F S'],
    key_hides: Float[Array, 'B 1 F P'],
) -> Float[Array, 'B N R K']:
    """Attend with the queries of both streams; on a mesh each device computes its samples and heads.

    Axes of the mesh that do not divide the samples do not split them: their devices compute the same samples.

    Args:
      queries: of the last image tokens, all or fewer.
      rotary: of all image tokens.
      query_hides, key_hides: additional dimensions of queries and keys, the same for all heads. Those of the keys hide
        the padding behind S from every query.
    """
    local, mesh = _attend, jax.sharding.get_abstract_mesh()
    rows = sum(x.shape[3] for x in (queries.text, queries.image) if x is not None)
    given = queries, keys, values, rotary, last_entries(query_hides, rows, axis=3), key_hides
    if not mesh.empty:
        # The partitioner cannot look into a kernel.
        batch = PartitionSpec(batch_axes(query_hides.shape[0]))
        heads = PartitionSpec(*batch, HEADS_AXIS if HEADS_AXIS in mesh.axis_names else None)
        specs_of = lambda streams: jax.tree.map(lambda x: heads if x.ndim == 4 else PartitionSpec(), streams)
        specs = (*map(specs_of, given[:3]), batch, batch, batch)
        local = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return local(*given)


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
    queries: Heads,
    keys: Heads,
    values: Heads,
    rotary: Rotary,
    query_hides: Float[Array, 'B 1 F R'],
    key_hides: Float[Array, 'B 1 F P'],
) -> Float[Array, 'B N R K']:
    """Make the operands in whole tiles and run the kernel; padded rows, which see all keys, are cut off again."""
    rows, width = query_hides.shape[3], queries.image.shape[2]
    (padded_rows, row_tile), (padded_keys, key_tile) = tiles(rows), tiles(key_hides.shape[3])
    cos, sin = (last_entries(table, queries.image.shape[3], axis=3) for table in rotary)
    form = Form(padded_rows, QK_NORM_EPSILON, 1 / math.sqrt(width))
    query = place_normed(queries, cos, sin, _whole(query_hides, padded_rows), form)
    key = place_normed(keys, rotary.cos, rotary.sin, _whole(key_hides, padded_keys), Form(padded_keys, QK_NORM_EPSILON))
    out = _kernel(query, key, place_values(values, padded_keys), _block_sizes(row_tile, key_tile, padded_keys))
    return out[:, :, :rows].astype(values.image.dtype)


def _whole(hides: Float[Array, 'B 1 F _'], tokens: int) -> Float[Array, 'B 1 _ _']:
    """Return additional dimensions in whole registers, for all tokens."""
    return jnp.pad(hides, [(0, 0), (0, 0), (0, -hides.shape[2] % FEATURES), (0, tokens - hides.shape[3])])


def _kernel(
    query: Float[Array, 'B N _ R'], key: Float[Array, 'B N _ P'], value: Float[Array, 'B N K P'], sizes: Any
) -> Float[Array, 'B N R K']:
    """Run the kernel on its operands."""

    def run(interpret: bool, *arrays: Any) -> Array:
        mask = pallas.MultiHeadMask([pallas.FullMask((query.shape[3], key.shape[3]))] * query.shape[1])
        splits: Any = {'head_shards': 1, 'q_seq_shards': 1, 'residual_checkpoint_name': OUTPUT}
        kernel = pallas.make_splash_mha(mask, block_sizes=sizes, interpret=interpret, **splits)
        out: Any = jax.vmap(kernel)(*arrays)
        return out

    # The kernel takes [tokens, K] and, by its layout, transposes back: the two cancel.
    operands = [x.swapaxes(2, 3) for x in (query, key, value)]
    return jax.lax.platform_dependent(
        *operands, tpu=functools.partial(run, False), default=functools.partial(run, True)
    )


def tiles(length: int) -> tuple[int, int]:
    """Return (padded length, tile): the fewest equal tiles of at most LONGEST_TILE that hold `length` tokens."""
    count = math.ceil(length / LONGEST_TILE)
    tile = math.ceil(length / (count * REGISTER)) * REGISTER
    return count * tile, tile
