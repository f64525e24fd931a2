"""CLIP towers: the layer that the text and picture towers share, and the text tower of the pooled prompt vector.

Legend: B batch (any number of leading axes, also none), L tokens, D width, N heads, K head dim, O projected width.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.neodragon import CLIPTextConfig
from neodragon_jax.config.safety_checker import SafetyCheckerConfig
from neodragon_jax.models.self_attention import MASKED, SelfAttention


class CLIPTextOutput(NamedTuple):
    """Output of a CLIP tower.

    `pooled` is the state at the end-of-text token, projected where the tower has a projection; `hidden_states` holds
    the embeddings and the output of every layer, so its last item is `last_hidden_state` before the final norm.
    """

    pooled: Float[Array, '*B O']
    last_hidden_state: Float[Array, '*B L D']
    hidden_states: tuple[Float[Array, '*B L D'], ...]


def _quick_gelu(x: Array) -> Array:
    return x * nn.sigmoid(1.702 * x)


def _gelu(x: Array) -> Array:
    # Looked up at call time, because exporters replace nn.gelu by one operation.
    return nn.gelu(x, approximate=False)


_CLIP_ACTIVATIONS = {'quick_gelu': _quick_gelu, 'gelu': _gelu}


class CLIPLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual; the same in text and picture towers."""

    config: CLIPTextConfig | SafetyCheckerConfig
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, '*B L D'], bias: Float[Array, 'L L']) -> Float[Array, '*B L D']:
        """Return the layer's output; `bias` holds the causal mask of a text tower and zeros in a picture tower."""
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

    `__call__` runs all parts; on a phone the host computes `embed` and `end_of_text`, the graph `transform` and `pool`.

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
