"""Transformer block of the denoiser: two token streams, text and image, that attend jointly.

Legend: B batch, L text tokens, I image tokens, S = L + I, D width, N heads, K head dim.
Source: arXiv 2403.03206 (SD3).
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.models.attention import Queries, strategy
from neodragon_jax.models.mesh import keep_batch_split
from neodragon_jax.models.modulation import BlockModulation, Modulation, modulate
from neodragon_jax.models.rotary import rotate

QK_NORM_EPSILON = 1e-5
# Name of the two token streams among the intermediates, where the caller makes these mutable: before the first block at
# the top, and after every block in its own scope.
STREAMS = 'streams'

_XAVIER = nn.initializers.xavier_uniform()


class FeedForward(nn.Module):
    """Linear to 4D, tanh-GELU, linear back."""

    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
        x = nn.Dense(4 * self.width, dtype=self.dtype, kernel_init=_XAVIER, name='linear_1')(x)
        x = nn.gelu(x, approximate=True)
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=_XAVIER, name='linear_2')(x)


class JointBlock(nn.Module):
    """Transformer block over two token streams that attend jointly.

    Tokens are [B, L, D], or [L, D] for a batch of one: a phone quantizes only matrix products of rank 2 per channel.
    The last block ends the text stream, and computes only the `keep` image tokens that are read.
    """

    config: MMDiTConfig
    dtype: Any = None
    last: bool = False
    attention: str = 'masked'

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, '... I D'], Float[Array, '... L D']],
        modulation: BlockModulation,
        rotary: Any,
        bias: Any,
        keep: int,
    ) -> tuple[tuple[Array, Array], None]:
        """Return (last `keep` image tokens, text) and None, the empty per-step output that a scan needs."""
        image, text = keep_batch_split(streams)
        tokens = image.shape[-2]
        on_image, on_text = modulation
        normed = modulate(image, on_image.gain_attention, on_image.shift_attention)
        if isinstance(on_text, Modulation):
            text_normed = modulate(text, on_text.gain_attention, on_text.shift_attention)
        else:
            text_normed = modulate(text, on_text.gain, on_text.shift)

        # The last block's text query is unused, but every released checkpoint has its parameters.
        text_query = self._heads('text_query', text_normed)
        query = rotate(self._heads('image_query', normed[..., -keep:, :]), rotary, tokens)
        key = rotate(self._heads('image_key', normed), rotary, tokens)
        attended_text, attended = strategy(self.attention).attend(
            Queries(None if self.last else text_query, query),
            jnp.concatenate([self._heads('text_key', text_normed), key], axis=1),
            jnp.concatenate([self._heads('text_value', text_normed), self._heads('image_value', normed)], axis=1),
            bias,
        )
        image = self._residual('image', image[..., -keep:, :], attended, on_image)
        if isinstance(on_text, Modulation) and attended_text is not None:
            text = self._residual('text', text, attended_text, on_text)
        self.sow('intermediates', STREAMS, (image, text))
        return (image, text), None

    def _heads(self, name: str, x: Array) -> Float[Array, 'B _ N K']:
        """Project to heads; apply an RMS norm per head to queries and keys, and scale queries by 1 / sqrt(K)."""
        config = self.config
        x = nn.Dense(config.width, dtype=self.dtype, kernel_init=_XAVIER, name=name)(x)
        x = x.reshape(-1, x.shape[-2], config.num_attention_heads, config.attention_head_dim)
        if name.endswith('value'):
            return x
        x = nn.RMSNorm(epsilon=QK_NORM_EPSILON, dtype=self.dtype, name=f'{name}_norm')(x)
        return x * (1 / math.sqrt(config.attention_head_dim)) if name.endswith('query') else x

    def _residual(self, stream: str, x: Array, attended: Array, modulation: Modulation) -> Array:
        """Add the gated attention output, then the gated MLP."""
        width = self.config.width
        attended = attended.reshape(*x.shape[:-1], width)
        attended = nn.Dense(width, dtype=self.dtype, kernel_init=_XAVIER, name=f'{stream}_out')(attended)
        x = x + modulation.gate_attention.astype(x.dtype) * attended
        normed = modulate(x, modulation.gain_mlp, modulation.shift_mlp)
        return x + modulation.gate_mlp.astype(x.dtype) * FeedForward(width, self.dtype, name=f'{stream}_mlp')(normed)
