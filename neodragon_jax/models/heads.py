"""Attention heads in two orders of axes, and the layers into and out of them.

  ROWS    [B, tokens, N, K], as a plain linear layer gives them; for phones and CPUs.
  LANES   [B, N, K, tokens]: tokens in the lanes of a TPU's registers, which K = 64 would fill by half. The TPU kernel
          takes them in this order, so that no array is transposed or padded around it.

The parameters are the same in both.

Legend: B batch, L tokens, D width, N heads, K head dim.
"""

from __future__ import annotations

import enum
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

XAVIER = nn.initializers.xavier_uniform()
# Of the RMS norms of queries and keys.
QK_NORM_EPSILON = 1e-5


class HeadOrder(enum.Enum):
    """Order of the axes of queries, keys and values; see the module."""

    ROWS = 'rows'
    LANES = 'lanes'


class HeadScale(nn.Module):
    """The parameters of `nn.RMSNorm` over the head dimension, for norms that a kernel computes."""

    head_dim: int

    @nn.compact
    def __call__(self) -> Float[Array, ' K']:
        return self.param('scale', nn.initializers.ones_init(), (self.head_dim,))


class ToLanes(nn.Module):
    """Linear from tokens to heads in LANES, with the parameters of `nn.Dense`."""

    heads: int
    head_dim: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, 'B L D']) -> Float[Array, 'B N K L']:
        kernel = self.param('kernel', XAVIER, (x.shape[-1], self.heads * self.head_dim))
        bias = self.param('bias', nn.initializers.zeros_init(), (self.heads * self.head_dim,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        kernel = kernel.reshape(-1, self.heads, self.head_dim)
        return jnp.einsum('bld,dnk->bnkl', x, kernel) + bias.reshape(self.heads, self.head_dim, 1)


class FromHeads(nn.Module):
    """Linear from the heads' output to tokens, with the parameters of `nn.Dense`."""

    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, 'B N L K']) -> Float[Array, 'B L D']:
        heads, head_dim = x.shape[1], x.shape[3]
        kernel = self.param('kernel', XAVIER, (heads * head_dim, self.width))
        bias = self.param('bias', nn.initializers.zeros_init(), (self.width,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        return jnp.einsum('bnlk,nkd->bld', x, kernel.reshape(heads, head_dim, -1)) + bias
