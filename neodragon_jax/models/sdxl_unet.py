"""UNet of the first-frame model: SDXL's, with the transformer blocks that SSD-1B retains.

Two entry points share one definition. `embed` turns timestep, pooled prompt and sizes into one vector; `denoise`
computes the rest, which a phone runs four times per picture.

Legend: B pictures, H W latent grid, h w a level's grid, C D channels, L text tokens, T text width, P pooled width,
E embedding width, Q queries, S keys, N heads.
Source: SDXL, arXiv 2307.01952, section 2; SSD-1B, arXiv 2401.02677.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.sdxl import Level, UNetConfig
from neodragon_jax.models.layers import timestep_sinusoid
from neodragon_jax.models.mmdit import ConditioningMLP
from neodragon_jax.models.sdxl_layers import ResnetBlock, conv, group_norm, halving_conv
from neodragon_jax.models.vae_decoder import double_space

# The config's epsilon is that of the residual blocks; the transformers use fixed ones.
_GROUP_EPSILON = 1e-6
_LAYER_EPSILON = 1e-5
_MLP_GROWTH = 4


class Attention(nn.Module):
    """Multi-head attention of `x` to `source`, which is `x` itself or the text; scores and softmax in float32."""

    heads: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, 'B Q C'], source: Float[Array, 'B S D']) -> Float[Array, 'B Q C']:
        width = x.shape[-1]
        dense = functools.partial(nn.Dense, width, dtype=self.dtype)

        def heads(name: str, tokens: Array) -> Array:
            flat = dense(use_bias=False, name=name)(tokens)
            return flat.reshape(*flat.shape[:2], self.heads, -1).swapaxes(1, 2)  # B N tokens head_dim

        query, key, value = heads('query', x), heads('key', source), heads('value', source)
        query = query * (1 / math.sqrt(width // self.heads))
        scores = jnp.matmul(query, key.swapaxes(2, 3), preferred_element_type=jnp.float32)  # B N Q S
        mixed = jnp.matmul(jax.nn.softmax(scores, axis=-1).astype(value.dtype), value)
        return dense(name='out')(mixed.swapaxes(1, 2).reshape(x.shape))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, and a gated-GELU MLP, each normed and with a residual."""

    heads: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, 'B Q C'], text: Float[Array, 'B L T']) -> Float[Array, 'B Q C']:
        width = x.shape[-1]
        norm = functools.partial(nn.LayerNorm, _LAYER_EPSILON, use_fast_variance=False, dtype=self.dtype)
        y = norm(name='norm_1')(x)
        x = x + Attention(self.heads, self.dtype, name='self_attention')(y, y)
        x = x + Attention(self.heads, self.dtype, name='text_attention')(norm(name='norm_2')(x), text)
        hidden = nn.Dense(2 * _MLP_GROWTH * width, dtype=self.dtype, name='mlp_in')(norm(name='norm_3')(x))
        value, gate = jnp.split(hidden, 2, axis=-1)
        hidden = value * nn.gelu(gate, approximate=False)
        return x + nn.Dense(width, dtype=self.dtype, name='mlp_out')(hidden)


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a grid, between two linears and around a skip."""

    depth: int
    heads: int
    groups: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, 'B h w C'], text: Float[Array, 'B L T']) -> Float[Array, 'B h w C']:
        batch, height, width, features = x.shape
        tokens = group_norm(self.groups, _GROUP_EPSILON, self.dtype, 'norm')(x)
        tokens = tokens.reshape(batch, height * width, features)
        tokens = nn.Dense(features, dtype=self.dtype, name='in')(tokens)
        for index in range(self.depth):
            tokens = TransformerBlock(self.heads, self.dtype, name=f'block_{index}')(tokens, text)
        return x + nn.Dense(features, dtype=self.dtype, name='out')(tokens).reshape(x.shape)


class _LevelBlocks(nn.Module):
    """Base of the down and up levels: residual blocks, each optionally followed by a transformer."""

    config: UNetConfig
    level: Level
    dtype: Any = None

    def block(self, index: int, x: Array, text: Array, embedding: Array) -> Array:
        """Return the output of a residual block and, where there is one, the transformer after it."""
        config, level = self.config, self.level
        resnet = ResnetBlock(
            level.features, config.norm_num_groups, config.norm_eps, self.dtype, name=f'resnet_{index}'
        )
        x = resnet(x, embedding)
        if not level.depths[index]:
            return x
        attend = Transformer(
            level.depths[index], level.heads, config.norm_num_groups, self.dtype, name=f'transformer_{index}'
        )
        return attend(x, text)


class DownLevel(_LevelBlocks):
    """Blocks of a level, then a halving of the grid, except after the last level."""

    @nn.compact
    def __call__(
        self, x: Float[Array, 'B h w C'], text: Float[Array, 'B L T'], embedding: Float[Array, 'B E']
    ) -> tuple[Float[Array, 'B _ _ D'], list[Float[Array, 'B _ _ D']]]:
        """Return the output and the skips for the way up, in order."""
        skips = []
        for index in range(len(self.level.depths)):
            x = self.block(index, x, text, embedding)
            skips.append(x)
        if self.level.resamples:
            x = halving_conv(self.level.features, 1, self.dtype, 'halve')(x)
            skips.append(x)
        return x, skips


class UpLevel(_LevelBlocks):
    """Blocks of a level, each applied to the previous output and a skip, then a doubling of the grid."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, 'B h w C'],
        skips: list[Float[Array, 'B h w _']],
        text: Float[Array, 'B L T'],
        embedding: Float[Array, 'B E'],
    ) -> Float[Array, 'B _ _ D']:
        """Return the output; the skips come in the order of use."""
        for index, skip in enumerate(skips):
            x = self.block(index, jnp.concatenate([x, skip], axis=-1), text, embedding)
        if self.level.resamples:
            x = conv(self.level.features, self.dtype, 'double')(double_space(x))
        return x


class UNet2DConditionModel(nn.Module):
    """UNet that predicts the noise in a noisy latent picture."""

    config: UNetConfig
    dtype: Any = None

    def setup(self) -> None:
        config, dtype = self.config, self.dtype
        self.time_embedding = ConditioningMLP(config.embedding_width)
        self.add_embedding = ConditioningMLP(config.embedding_width)
        self.conv_in = conv(config.block_out_channels[0], dtype)
        self.down = [DownLevel(config, level, dtype) for level in config.down_levels]
        self.mid = ResnetBlock(config.block_out_channels[-1], config.norm_num_groups, config.norm_eps, dtype)
        self.up = [UpLevel(config, level, dtype) for level in config.up_levels]
        self.norm_out = group_norm(config.norm_num_groups, config.norm_eps, dtype)
        self.conv_out = conv(config.out_channels, dtype)

    def __call__(
        self,
        x: Float[Array, 'B H W C'],
        timestep: Float[Array, ' B'],
        text: Float[Array, 'B L T'],
        pooled: Float[Array, 'B P'],
        sizes: Float[Array, 'B 6'],
    ) -> Float[Array, 'B H W D']:
        """Return the noise in `x`.

        Args:
          timestep: 0 (clean) to 999 (noise).
          text: states of both text towers, side by side.
          pooled: pooled vector of the second tower.
          sizes: original size, crop corner and target size in pixels, (rows, columns) each.
        Raises:
          InputError: the grid cannot be halved between all levels.
        """
        return self.denoise(x, text, self.embed(timestep, pooled, sizes))

    def embed(
        self, timestep: Float[Array, ' B'], pooled: Float[Array, 'B P'], sizes: Float[Array, 'B 6']
    ) -> Float[Array, 'B E']:
        """Return the activated embedding of timestep, pooled prompt and sizes, in float32."""
        config = self.config
        time = self.time_embedding(timestep_sinusoid(timestep, config.block_out_channels[0]))
        size = timestep_sinusoid(sizes.reshape(-1), config.addition_time_embed_dim).reshape(sizes.shape[0], -1)
        return nn.silu(time + self.add_embedding(jnp.concatenate([pooled, size], axis=-1)))

    def denoise(
        self, x: Float[Array, 'B H W C'], text: Float[Array, 'B L T'], embedding: Float[Array, 'B E']
    ) -> Float[Array, 'B H W D']:
        """Return the noise in `x`, given the result of `embed`."""
        factor = 2 ** (len(self.down) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise InputError(f'x is {x.shape[1]}x{x.shape[2]}; give a grid of multiples of {factor}.')
        x = self.conv_in(x)
        skips = [x]
        for level in self.down:
            x, more = level(x, text, embedding)
            skips += more
        x = self.mid(x, embedding)
        for level in self.up:
            count = len(level.level.inputs)
            x = level(x, skips[: -count - 1 : -1], text, embedding)
            skips = skips[:-count]
        return self.conv_out(nn.silu(self.norm_out(x)))
