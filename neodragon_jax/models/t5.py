"""Text encoders: the distilled T5 encoder of the token states, and the CLIP towers of the pooled prompt vector.

Shapes: B batch (any number of leading axes, also none), L tokens, D width, N heads, K head dim, O projected width.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.neodragon import CLIPTextConfig, T5Config, T5EncoderConfig
from neodragon_jax.config.safety_checker import SafetyCheckerConfig

# Score of a forbidden key. Far enough below any real score for its weight to be exactly zero in float32, and finite in
# float16, where the phone graphs run.
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
        """Return the mixed tokens; `bias` broadcasts against the scores [*B, N, L, L]."""
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


def relative_position_buckets(distance: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Return the T5 bucket of each signed distance, key position minus query position.

    Each sign owns half of the buckets. In a half, the nearer distances have one bucket each; the others share buckets
    whose widths grow geometrically up to `max_distance`, beyond which everything falls into the last.

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

    Calling it fuses its parts: a phone looks `embed` up on the host and runs `transform`.
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

        Padded positions attend to the valid ones like any other, so their states are defined but mean nothing.

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
        """Return the score bias that the distances between `length` tokens give."""
        return self.position_bias(length)

    def transform(self, x: Float[Array, '*B L D'], bias: Float[Array, '*B N L L']) -> Float[Array, '*B L D']:
        """Return the final-normed states of embeddings; `bias` holds positions and mask."""
        for block in self.block:
            x = block(x, bias)
        return self.final_norm(x)


def key_bias(mask: Int[Array, '*B L'] | Bool[Array, '*B L']) -> Float[Array, '*B 1 L']:
    """Return what is added to the scores of each key: nothing for valid tokens, MASKED for others."""
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


class CLIPTextOutput(NamedTuple):
    """What a CLIP tower gives.

    `pooled` is the state at the end-of-text token, projected where the tower has a projection; `hidden_states` holds
    the embeddings and the output of every layer, so its last item is `last_hidden_state` before the final norm.
    """

    pooled: Float[Array, '*B O']
    last_hidden_state: Float[Array, '*B L D']
    hidden_states: tuple[Float[Array, '*B L D'], ...]


def _quick_gelu(x: Array) -> Array:
    return x * nn.sigmoid(1.702 * x)


def _gelu(x: Array) -> Array:
    # Looked up when called: exporters replace the function by one operation.
    return nn.gelu(x, approximate=False)


_CLIP_ACTIVATIONS = {'quick_gelu': _quick_gelu, 'gelu': _gelu}


class CLIPLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual; the same in towers of text and of pictures."""

    config: CLIPTextConfig | SafetyCheckerConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, '*B L D'], bias: Float[Array, 'L L']) -> Float[Array, '*B L D']:
        """Return the layer's output; `bias` holds the causal mask, which a tower of pictures has not."""
        c = self.config
        head_dim = c.hidden_size // c.num_attention_heads
        norm = functools.partial(nn.LayerNorm, epsilon=c.layer_norm_eps, dtype=self.dtype)
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        attention = SelfAttention(
            num_heads=c.num_attention_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            use_bias=True,
            dtype=self.dtype,
            name='attention',
        )
        x = x + attention(norm(name='attention_norm')(x), bias)
        hidden = dense(c.intermediate_size, name='mlp_in')(norm(name='mlp_norm')(x))
        return x + dense(c.hidden_size, name='mlp_out')(_CLIP_ACTIVATIONS[c.hidden_act](hidden))


class CLIPTextModel(nn.Module):
    """CLIP text tower with learned positions and causal attention; padding is not masked.

    Calling it fuses its parts: a phone looks `embed` and `end_of_text` up on the host and runs `transform` and `pool`.

    Source: Radford et al., Learning Transferable Visual Models, arXiv 2103.00020, section 2.4.
    """

    config: CLIPTextConfig
    projection: bool
    dtype: Any = None

    def setup(self) -> None:
        c = self.config
        embed = functools.partial(
            nn.Embed, features=c.hidden_size, embedding_init=nn.initializers.normal(0.02), dtype=self.dtype
        )
        self.token_embedding = embed(c.vocab_size)
        self.position_embedding = embed(c.max_position_embeddings)
        self.layer = [CLIPLayer(c, self.dtype) for _ in range(c.num_hidden_layers)]
        self.final_norm = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype)
        if self.projection:
            self.projected = nn.Dense(c.projection_dim, use_bias=False, dtype=self.dtype, name='projection')

    def __call__(self, ids: Int[Array, '*B L']) -> CLIPTextOutput:
        """Return pooled vector and states.

        Raises:
          InputError: the sequence is longer than the tower's table of positions.
        """
        states = self.transform(self.embed(ids))
        last = self.final_norm(states[-1])
        end = self.end_of_text(ids)[..., None, None]
        pooled = self.project(jnp.take_along_axis(last, end, axis=-2, mode='promise_in_bounds'))  # *B 1 O
        return CLIPTextOutput(pooled[..., 0, :], last, states)

    def embed(self, ids: Int[Array, '*B L']) -> Float[Array, '*B L D']:
        """Return the embeddings of tokens and positions.

        Raises:
          InputError: the sequence is longer than the tower's table of positions.
        """
        length, positions = ids.shape[-1], self.config.max_position_embeddings
        if length > positions:
            raise InputError(f'ids are {length} tokens long; this tower has {positions} positions: cut them.')
        return self.token_embedding(ids) + self.position_embedding(np.arange(length))

    def transform(self, x: Float[Array, '*B L D']) -> tuple[Float[Array, '*B L D'], ...]:
        """Return embeddings and the output of every layer."""
        length = x.shape[-2]
        causal = jnp.asarray(np.where(np.tri(length, dtype=bool), 0.0, MASKED), jnp.float32)
        states = [x]
        for layer in self.layer:
            states.append(layer(states[-1], causal))
        return tuple(states)

    def pool(self, states: Float[Array, '*B L D'], end: Float[Array, '*B 1 L']) -> Float[Array, '*B 1 O']:
        """Return the pooled vector from the last layer's output; `end` is 1 at the end-of-text token and else 0."""
        return self.project(jnp.matmul(end, self.final_norm(states)))

    def project(self, state: Float[Array, '*B 1 D']) -> Float[Array, '*B 1 O']:
        """Return the projection of a final-normed state, or the state where the tower has none."""
        return self.projected(state) if self.projection else state

    def end_of_text(self, ids: Int[Array, '*B L']) -> Int[Array, '*B']:
        """Return the position of the first end-of-text token."""
        # 2 is a historical mistake in published configs, whose true end-of-text token is the last of the vocabulary.
        if self.config.eos_token_id == 2:
            return jnp.argmax(ids, axis=-1)
        return jnp.argmax(ids == self.config.eos_token_id, axis=-1)
