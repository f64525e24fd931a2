"""Transformer block of the denoiser: two token streams, text and image, that attend jointly.

Legend: B batch, L text tokens, I image tokens, S = L + I, D width, N heads, K head dim.
Source: arXiv 2403.03206 (SD3).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.models.attention import Attended, Queries, strategy
from neodragon_jax.models.heads import QK_NORM_EPSILON, XAVIER, FromHeads, HeadOrder, HeadScale, ToLanes
from neodragon_jax.models.mesh import keep_batch_split
from neodragon_jax.models.modulation import BlockModulation, Modulation, modulate
from neodragon_jax.models.operands import Heads
from neodragon_jax.models.rotary import rotate

# Name of the two token streams among the intermediates, where the caller makes these mutable: before the first block at
# the top, and after every block in its own scope.
STREAMS = 'streams'


class FeedForward(nn.Module):
    """Linear to 4D, tanh-GELU, linear back."""

    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
        x = nn.Dense(4 * self.width, dtype=self.dtype, kernel_init=XAVIER, name='linear_1')(x)
        x = nn.gelu(x, approximate=True)
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=XAVIER, name='linear_2')(x)


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
        on_image, on_text = modulation
        normed = self._modulate(image, on_image.gain_attention, on_image.shift_attention)
        if isinstance(on_text, Modulation):
            text_normed = self._modulate(text, on_text.gain_attention, on_text.shift_attention)
        else:
            text_normed = self._modulate(text, on_text.gain, on_text.shift)

        attended_text, attended = self._attend(text_normed, normed, rotary, bias, keep)
        image = self._residual('image', image[..., -keep:, :], attended, on_image)
        if isinstance(on_text, Modulation) and attended_text is not None:
            text = self._residual('text', text, attended_text, on_text)
        self.sow('intermediates', STREAMS, (image, text))
        return (image, text), None

    def _attend(self, text: Array, image: Array, rotary: Any, bias: Any, keep: int) -> Attended:
        """Return the attention output of text, None in the last block, and of the last `keep` image tokens."""
        attention, kept = strategy(self.attention), image[..., -keep:, :]
        # The last block's text query is unused, but every released checkpoint has its parameters.
        if attention.order is HeadOrder.LANES:
            query = self._lanes('query', text, kept)
            query = query._replace(text=None, text_scale=None) if self.last else query
            return attention.attend(
                query, self._lanes('key', text, image), self._lanes('value', text, image), rotary, bias
            )
        tokens, join = image.shape[-2], functools.partial(jnp.concatenate, axis=1)
        text_query = self._heads('text_query', text)
        query = rotate(self._heads('image_query', kept), rotary, tokens)
        key = rotate(self._heads('image_key', image), rotary, tokens)
        return attention.attend(
            Queries(None if self.last else text_query, query),
            join([self._heads('text_key', text), key]),
            join([self._heads('text_value', text), self._heads('image_value', image)]),
            bias,
        )

    def _modulate(self, x: Array, gain: Array, shift: Array) -> Array:
        """Normalize and modulate; in one pass where the attention is for training on a TPU."""
        return modulate(x, gain, shift, one_pass=strategy(self.attention).order is HeadOrder.LANES)

    def _heads(self, name: str, x: Array) -> Float[Array, 'B _ N K']:
        """Project to heads; apply an RMS norm per head to queries and keys, and scale queries by 1 / sqrt(K)."""
        heads, head_dim = self.config.num_attention_heads, self.config.attention_head_dim
        x = nn.Dense(heads * head_dim, dtype=self.dtype, kernel_init=XAVIER, name=name)(x)
        x = x.reshape(-1, x.shape[-2], heads, head_dim)
        if name.endswith('value'):
            return x
        x = nn.RMSNorm(epsilon=QK_NORM_EPSILON, dtype=self.dtype, name=f'{name}_norm')(x)
        return x * (1 / math.sqrt(head_dim)) if name.endswith('query') else x

    def _lanes(self, kind: str, text: Float[Array, 'B L D'], image: Float[Array, 'B _ D']) -> Heads:
        """Project both streams to heads in LANES; the kernel applies the norms of queries and keys."""
        heads, head_dim = self.config.num_attention_heads, self.config.attention_head_dim
        project = lambda stream, x: ToLanes(heads, head_dim, self.dtype, name=f'{stream}_{kind}')(x)
        scale = lambda stream: None if kind == 'value' else HeadScale(head_dim, name=f'{stream}_{kind}_norm')()
        return Heads(project('text', text), project('image', image), scale('text'), scale('image'))

    def _residual(self, stream: str, x: Array, attended: Array, modulation: Modulation) -> Array:
        """Add the gated attention output, then the gated MLP."""
        width, name = self.config.width, f'{stream}_out'
        if strategy(self.attention).order is HeadOrder.LANES:
            attended = FromHeads(width, self.dtype, name=name)(attended)
        else:
            attended = attended.reshape(*x.shape[:-1], width)
            attended = nn.Dense(width, dtype=self.dtype, kernel_init=XAVIER, name=name)(attended)
        x = x + modulation.gate_attention.astype(x.dtype) * attended
        normed = self._modulate(x, modulation.gain_mlp, modulation.shift_mlp)
        return x + modulation.gate_mlp.astype(x.dtype) * FeedForward(width, self.dtype, name=f'{stream}_mlp')(normed)
