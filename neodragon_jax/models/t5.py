"""T5 encoders: the distilled encoder of the token states, and the plain encoder of its teacher.

Legend: B batch (any number of leading axes, also none), L tokens, D width, N heads, K head dim, O projected width.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.neodragon import T5Config, T5EncoderConfig
from neodragon_jax.models.self_attention import MASKED, SelfAttention


def relative_position_buckets(distance: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Return the T5 bucket of each signed distance, key position minus query position.

    Each sign has half of the buckets. In a half, small distances have one bucket each. Larger distances share buckets
    whose widths grow geometrically up to `max_distance`; the last bucket holds all distances beyond it.

    Source: Raffel et al., Exploring the Limits of Transfer Learning, arXiv 1910.10683, section 2.1.
    """
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distance)
    # Float32, as in T5: bucket limits are powers of two, where the logarithm's rounding decides.
    growth = np.log(np.maximum(size, exact).astype(np.float32) / exact) / np.log(max_distance / exact)
    shared = np.minimum(exact + (growth * (half - exact)).astype(np.int32), half - 1)
    return np.where(size < exact, size, shared) + np.where(distance > 0, half, 0)


class RelativePositionBias(nn.Module):
    """Learned score bias per head and distance bucket, one table for all layers."""

    config: T5EncoderConfig

    @nn.compact
    def __call__(self, length: int) -> Float[Array, 'N L L']:
        """Return the bias for `length` query and key positions."""
        c = self.config
        positions = np.arange(length)
        buckets = relative_position_buckets(
            positions[None, :] - positions[:, None],
            c.relative_attention_num_buckets,
            c.relative_attention_max_distance,
        )
        table = nn.Embed(
            c.relative_attention_num_buckets,
            c.num_heads,
            embedding_init=nn.initializers.normal(c.d_model**-0.5),
            dtype=jnp.float32,
            name='table',
        )
        return jnp.transpose(table(buckets), (2, 0, 1))


class T5Block(nn.Module):
    """Pre-norm attention and gated-GELU feed-forward, each with a residual."""

    config: T5EncoderConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, '*B L D'], bias: Float[Array, '*B N L L']) -> Float[Array, '*B L D']:
        """Return the block's output; `bias` holds positions and mask."""
        c = self.config
        normal = nn.initializers.normal
        norm = functools.partial(nn.RMSNorm, epsilon=c.layer_norm_epsilon, dtype=self.dtype)
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        attention = SelfAttention(
            num_heads=c.num_heads,
            head_dim=c.d_kv,
            scale=1.0,  # T5 folds 1/sqrt(K) into the initial query weights.
            use_bias=False,
            inits=(
                normal((c.d_model * c.d_kv) ** -0.5),
                normal(c.d_model**-0.5),
                normal((c.num_heads * c.d_kv) ** -0.5),
            ),
            dtype=self.dtype,
            name='attention',
        )
        x = x + attention(norm(name='attention_norm')(x), bias)
        y = norm(name='mlp_norm')(x)
        gate = dense(c.d_ff, kernel_init=normal(c.d_model**-0.5), name='mlp_gate')(y)
        value = dense(c.d_ff, kernel_init=normal(c.d_model**-0.5), name='mlp_value')(y)
        hidden = nn.gelu(gate, approximate=True) * value
        return x + dense(c.d_model, kernel_init=normal(c.d_ff**-0.5), name='mlp_out')(hidden)


class T5Encoder(nn.Module):
    """T5 v1.1 encoder: unscaled embeddings, bias-free layers, relative positions only.

    `__call__` runs all parts; on a phone the host looks up `embed` and the graph is `transform`.
    """

    config: T5EncoderConfig
    dtype: Any = None

    def setup(self) -> None:
        c = self.config
        self.position_bias = RelativePositionBias(c)
        self.token_embedding = nn.Embed(
            c.vocab_size, c.d_model, embedding_init=nn.initializers.normal(1.0), dtype=self.dtype
        )
        self.block = [T5Block(c, self.dtype) for _ in range(c.num_layers)]
        self.final_norm = nn.RMSNorm(epsilon=c.layer_norm_epsilon, dtype=self.dtype)

    def __call__(
        self, ids: Int[Array, '*B L'], mask: Int[Array, '*B L'] | Bool[Array, '*B L']
    ) -> Float[Array, '*B L D']:
        """Return the final-normed states.

        Padded positions attend to the valid ones; their states are finite but unused.

        Args:
          ids: token ids.
          mask: nonzero for valid tokens; at least one in each row.
        Raises:
          InputError: the shapes differ.
        """
        if ids.shape != mask.shape:
            raise InputError(f'mask has shape {mask.shape}, ids {ids.shape}; give one mask value per token.')
        keys = key_bias(mask)[..., None, :, :]
        return self.transform(self.embed(ids), self.positions(ids.shape[-1]) + keys)

    def embed(self, ids: Int[Array, '*B L']) -> Float[Array, '*B L D']:
        """Return the embeddings of tokens."""
        return self.token_embedding(ids)

    def positions(self, length: int) -> Float[Array, 'N L L']:
        """Return the score bias from the relative positions of `length` tokens."""
        return self.position_bias(length)

    def transform(self, x: Float[Array, '*B L D'], bias: Float[Array, '*B N L L']) -> Float[Array, '*B L D']:
        """Return the final-normed states of embeddings; `bias` holds positions and mask."""
        for block in self.block:
            x = block(x, bias)
        return self.final_norm(x)


def key_bias(mask: Int[Array, '*B L'] | Bool[Array, '*B L']) -> Float[Array, '*B 1 L']:
    """Return the addend of each key's scores: 0 for valid tokens, MASKED for padding."""
    return jnp.where(mask.astype(bool), 0.0, MASKED)[..., None, :]


class T5EncoderWithProjection(nn.Module):
    """DT5: a T5 encoder and the two-layer projection to the width of the teacher's T5-XXL states.

    Source: Neodragon, section on text-encoder distillation.
    """

    config: T5Config
    dtype: Any = None

    def setup(self) -> None:
        c = self.config
        dense = functools.partial(nn.Dense, c.out_dim, use_bias=False, dtype=self.dtype)
        self.encoder = T5Encoder(c, self.dtype)
        self.projection_in = dense()
        self.projection_out = dense()
        self.dropout = nn.Dropout(c.dropout_rate)

    def encode(self, ids: Int[Array, '*B L'], mask: Int[Array, '*B L'] | Bool[Array, '*B L']) -> Float[Array, '*B L D']:
        """Return the encoder's final-normed states, before the projection. Arguments as in `T5Encoder`."""
        return self.encoder(ids, mask)

    def __call__(
        self,
        ids: Int[Array, '*B L'],
        mask: Int[Array, '*B L'] | Bool[Array, '*B L'],
        deterministic: bool = True,
    ) -> Float[Array, '*B L O']:
        """Return the projected token states.

        Args:
          ids: token ids.
          mask: nonzero for valid tokens; at least one in each row.
          deterministic: False drops projected features at `config.dropout_rate` and needs the rng `dropout`.
        """
        return self.project(self.encode(ids, mask), deterministic)

    def project(self, states: Float[Array, '*B L D'], deterministic: bool = True) -> Float[Array, '*B L O']:
        """Return the projection of the encoder's states."""
        hidden = nn.relu(self.projection_in(states))
        return self.projection_out(self.dropout(hidden, deterministic=deterministic))
