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

from neodragon_jax.models.layers import last_entries
from neodragon_jax.models.mesh import HEADS_AXIS, batch_axes

# Tiles are multiples of a vector register's lanes, and their scores must fit a core's vector memory in float32.
REGISTER, LONGEST_TILE = 128, 1024
# Dimensions that hide are filled with zeros to a multiple of this: a register holds 16 rows of bfloat16.
FEATURES = 16
# Name of the kernel's output for policies of rematerialization.
OUTPUT = 'attention'


def attend(
    query: Float[Array, 'B N K R'],
    key: Float[Array, 'B N K S'],
    value: Float[Array, 'B N K S'],
    query_hides: Float[Array, 'B 1 F S'],
    key_hides: Float[Array, 'B 1 F P'],
) -> Float[Array, 'B N R K']:
    """Attend with the last R tokens; on a mesh each device computes its samples and heads.

    Args:
      query: scaled.
      query_hides, key_hides: additional dimensions of queries and keys, the same for all heads. Those of the keys hide
        the padding behind S from every query.
    """
    local, mesh = _attend, jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # The partitioner cannot look into a kernel.
        batch = batch_axes()
        heads = PartitionSpec(batch, HEADS_AXIS if HEADS_AXIS in mesh.axis_names else None)
        specs = (heads, heads, heads, PartitionSpec(batch), PartitionSpec(batch))
        local = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return local(query, key, value, last_entries(query_hides, query.shape[3], axis=3), key_hides)


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
    query: Float[Array, 'B N K R'],
    key: Float[Array, 'B N K S'],
    value: Float[Array, 'B N K S'],
    query_hides: Float[Array, 'B 1 F R'],
    key_hides: Float[Array, 'B 1 F P'],
) -> Float[Array, 'B N R K']:
    """Run the kernel on whole tiles; padded rows, which see all keys, are cut off again."""
    rows = query.shape[3]
    (padded_rows, row_tile), (padded_keys, key_tile) = tiles(rows), tiles(key.shape[3])
    sizes = _block_sizes(row_tile, key_tile, padded_keys)

    def run(interpret: bool, *arrays: Any) -> Array:
        mask = pallas.MultiHeadMask([pallas.FullMask((padded_rows, padded_keys))] * query.shape[1])
        splits: Any = {'head_shards': 1, 'q_seq_shards': 1, 'residual_checkpoint_name': OUTPUT}
        kernel = pallas.make_splash_mha(mask, block_sizes=sizes, interpret=interpret, **splits)
        out: Any = jax.vmap(kernel)(*arrays)
        return out

    operands = _pad(query, query_hides, padded_rows), _pad(key, key_hides, padded_keys), _pad(value, None, padded_keys)
    # The kernel takes [tokens, K] and, by its layout, transposes back: the two cancel.
    operands = [x.swapaxes(2, 3) for x in operands]
    on_tpu, elsewhere = functools.partial(run, False), functools.partial(run, True)
    out = jax.lax.platform_dependent(*operands, tpu=on_tpu, default=elsewhere)
    return out[:, :, :rows].astype(value.dtype)


def _pad(x: Float[Array, 'B N K L'], hides: Float[Array, 'B 1 F _'] | None, length: int) -> Float[Array, 'B N _ _']:
    """Pad the tokens with zeros, and append the dimensions that hide, whole registers of them."""
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, length - x.shape[3])])
    if hides is None:
        return x
    added = -(-hides.shape[2] // FEATURES) * FEATURES
    empty = [(0, 0), (0, 0), (0, added - hides.shape[2]), (0, length - hides.shape[3])]
    hides = jnp.broadcast_to(jnp.pad(hides.astype(x.dtype), empty), (*x.shape[:2], added, length))
    return jnp.concatenate([x, hides], axis=2)


def tiles(length: int) -> tuple[int, int]:
    """Return (padded length, tile): the fewest equal tiles of at most LONGEST_TILE that hold `length` tokens."""
    count = math.ceil(length / LONGEST_TILE)
    tile = math.ceil(length / (count * REGISTER)) * REGISTER
    return count * tile, tile
