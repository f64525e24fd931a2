"""Multi-head self-attention of the text and picture encoders, with a bias on the scores for masks and positions.

Legend: B batch (any number of leading axes, also none), L tokens, D width, N heads, K head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Score of a forbidden key: low enough for a weight of exactly zero in float32, and finite in float16, which the phone
# graphs compute in.
MASKED = -1e4


class SelfAttention(nn.Module):
    """Multi-head self-attention with a bias added to the scores."""

    num_heads: int
    head_dim: int
    scale: float
    use_bias: bool
    # (query, key and value, output)
    inits: tuple[nn.initializers.Initializer, ...] = (nn.linear.default_kernel_init,) * 3
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, '*B L D'], bias: Float[Array, '... L L']) -> Float[Array, '*B L D']:
        """Return the attention output; `bias` broadcasts against the scores [*B, N, L, L]."""
        dense = functools.partial(nn.Dense, use_bias=self.use_bias, dtype=self.dtype)
        query_init, key_value_init, out_init = self.inits

        def heads(name: str, init: nn.initializers.Initializer) -> Array:
            flat = dense(self.num_heads * self.head_dim, kernel_init=init, name=name)(x)
            split = flat.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
            return jnp.swapaxes(split, -3, -2)  # *B N L K

        query, key, value = heads('query', query_init), heads('key', key_value_init), heads('value', key_value_init)
        scores = jnp.matmul(query, jnp.swapaxes(key, -1, -2), preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * self.scale + bias, axis=-1)  # *B N L L
        mixed = jnp.swapaxes(jnp.matmul(weights.astype(value.dtype), value), -3, -2)  # *B L N K
        return dense(x.shape[-1], kernel_init=out_init, name='out')(mixed.reshape(*x.shape[:-1], -1))
