"""Attention heads in two orders of axes, and the linear layers into and out of them.

  ROWS    [B, tokens, N, K], as a plain linear layer gives them; for phones and CPUs.
  LANES   [B, N, K, tokens]: tokens in the lanes of a TPU's registers, which K = 64 would fill by half. The TPU kernel
          takes them in this order, so that no array is transposed or padded around it.

The parameters are the same in both.

Legend: B batch, L tokens, D width, N heads, K head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

XAVIER = nn.initializers.xavier_uniform()


class HeadOrder(NamedTuple):
    """Axes of queries, keys and values.

    Attributes:
      tokens: axis of the tokens.
      features: axis of the head dimension.
    """

    tokens: int
    features: int


ROWS, LANES = HeadOrder(tokens=1, features=-1), HeadOrder(tokens=3, features=2)


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
