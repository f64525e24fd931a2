"""PyramidMMDiT: the joint-attention denoiser of Neodragon (SD3-style blocks, blockwise causal over frames).

Two entrances share one definition. `condition` computes what depends on the prompt, the timestep and the place in
the video only: positions, rotary tables, attention bias, modulation. `denoise` is the rest, the part that a phone
runs. Training and sampling call both inside one compiled function; the phone gets `condition`'s result as inputs.

Legend: B batch, T latent frames, H W latent grid, C channels, F frames, L text tokens, I image tokens, S = L + I,
D width, N heads, K head dim, P numbers in a patch, X current image tokens.
Source: arXiv 2511.06055, section 3; arXiv 2403.03206 (SD3) for the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int

from neodragon_jax.config import MMDiTConfig
from neodragon_jax.errors import InputError
from neodragon_jax.layout import (
    Layout,
    attention_bias,
    attention_mask,
    layout_of,
    patchify,
    position_ids,
    unpatchify,
)
from neodragon_jax.models.layers import (
    attention,
    layer_norm,
    rotary_table,
    rotate,
    sincos_table,
    timestep_sinusoid,
)

TIMESTEP_WIDTH = 256
QK_NORM_EPSILON = 1e-5

_XAVIER = nn.initializers.xavier_uniform()
_SMALL = nn.initializers.normal(0.02)
_ZEROS = nn.initializers.zeros_init()

# What rematerialisation keeps from the forward pass of a block.
REMAT_POLICIES = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Modulation(NamedTuple):
    """AdaLN vectors of one token stream of one block, each [B, 1, D]; a gain is 1 + the released scale."""

    shift_attention: Array
    gain_attention: Array
    gate_attention: Array
    shift_mlp: Array
    gain_mlp: Array
    gate_mlp: Array


class FinalModulation(NamedTuple):
    """AdaLN vectors of a norm that nothing follows, each [B, 1, D]."""

    gain: Array
    shift: Array


class BlockModulation(NamedTuple):
    """AdaLN vectors of one block; the last block's text stream only feeds attention."""

    image: Modulation
    text: Modulation | FinalModulation


class Condition(NamedTuple):
    """All inputs of `denoise` that do not depend on the latents.

    Attributes:
      positions: [I, D], rows of the positional table.
      cos, sin: [B, S, 1, K/2], rotary tables.
      bias: [B, 1, S, S], added to the attention scores.
      blocks: modulation of all blocks but the last: one BlockModulation of arrays [blocks, B, 1, D] if the blocks
        are scanned, else a sequence of them.
      last_block: modulation of the last block.
      head: modulation of the output norm.
    """

    positions: Array
    cos: Array
    sin: Array
    bias: Array
    blocks: Any
    last_block: BlockModulation
    head: FinalModulation


class ConditioningMLP(nn.Module):
    """Linear, SiLU, linear: embeds the timestep or the pooled prompt, [B, *] -> [B, D], in float32."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, 'B p']) -> Float[Array, 'B D']:
        x = nn.Dense(self.width, dtype=jnp.float32, kernel_init=_SMALL, name='linear_1')(x)
        return nn.Dense(self.width, dtype=jnp.float32, kernel_init=_SMALL, name='linear_2')(nn.silu(x))


class ModulationLinear(nn.Module):
    """Linear from the activated conditioning to `parts` vectors of the same width, in float32."""

    parts: int

    @nn.compact
    def __call__(self, x: Float[Array, 'B D']) -> list[Float[Array, 'B 1 D']]:
        features = (self.parts, x.shape[-1])
        dense = nn.DenseGeneral(features, dtype=jnp.float32, kernel_init=_ZEROS, name='linear')
        return list(jnp.split(dense(x), self.parts, axis=1))


class BlockModulator(nn.Module):
    """All AdaLN vectors of one block from the conditioning, [B, D] -> BlockModulation.

    These linears hold a third of the model's parameters and run once per timestep, not once per token, so they are
    apart from the block: a phone computes them outside the denoiser graph.
    """

    last: bool = False

    @nn.compact
    def __call__(self, embedding: Float[Array, 'B D']) -> BlockModulation:
        active = nn.silu(embedding)
        image = _modulation(ModulationLinear(6, name='image')(active))
        if not self.last:
            return BlockModulation(image, _modulation(ModulationLinear(6, name='text')(active)))
        # Released order of the two: scale, then shift; everywhere else shift comes first.
        scale, shift = ModulationLinear(2, name='text')(active)
        return BlockModulation(image, FinalModulation(1 + scale, shift))


def _modulation(parts: Sequence[Array]) -> Modulation:
    """Turn the six released vectors (shift, scale, gate for attention, then for the MLP) into a Modulation."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
    return Modulation(shift, 1 + scale, gate, mlp_shift, 1 + mlp_scale, mlp_gate)


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
    """Transformer block over two token streams that attend jointly, text first.

    Tokens come as [B, L, D], or as [L, D] for a batch of one: matrix products of rank 2 are what quantises per
    channel on a phone. The last block ends the text stream, and computes only the `keep` image tokens that are read.
    """

    config: MMDiTConfig
    dtype: Any = None
    last: bool = False

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, '... I D'], Float[Array, '... L D']],
        modulation: BlockModulation,
        cos: Float[Array, '#B S 1 k'],
        sin: Float[Array, '#B S 1 k'],
        bias: Float[Array, '#B 1 S S'],
        keep: int,
    ) -> tuple[tuple[Array, Array], None]:
        """Return both streams, of the image its last `keep` tokens, and None: a scan over blocks collects nothing."""
        image, text = streams
        length = text.shape[-2]
        on_image, on_text = modulation
        normed = _modulate(image, on_image.gain_attention, on_image.shift_attention)
        if isinstance(on_text, Modulation):
            text_normed = _modulate(text, on_text.gain_attention, on_text.shift_attention)
        else:
            text_normed = _modulate(text, on_text.gain, on_text.shift)

        query = self._heads('image_query', normed[..., -keep:, :])
        # The last block's text query is read by nobody, but it has parameters in every released checkpoint.
        text_query = self._heads('text_query', text_normed)
        key = self._joint('key', text_normed, normed)
        value = self._joint('value', text_normed, normed)
        if not self.last:
            query = jnp.concatenate([text_query, query], axis=1)
        rows = query.shape[1]
        query, key = rotate(query, cos[:, -rows:], sin[:, -rows:]), rotate(key, cos, sin)
        out = attention(query, key, value, bias[:, :, -rows:])
        out = out.reshape(*image.shape[:-2], rows, image.shape[-1])
        image = self._residual('image', image[..., -keep:, :], out[..., -keep:, :], on_image)
        if isinstance(on_text, Modulation):
            text = self._residual('text', text, out[..., :length, :], on_text)
        return (image, text), None

    def _heads(self, name: str, x: Array) -> Float[Array, 'B L N K']:
        """Project to heads; queries and keys get an RMS norm per head."""
        config = self.config
        x = nn.Dense(config.width, dtype=self.dtype, kernel_init=_XAVIER, name=name)(x)
        x = x.reshape(-1, x.shape[-2], config.num_attention_heads, config.attention_head_dim)
        if name.endswith('value'):
            return x
        return nn.RMSNorm(epsilon=QK_NORM_EPSILON, dtype=self.dtype, name=f'{name}_norm')(x)

    def _joint(self, part: str, text: Array, image: Array) -> Float[Array, 'B S N K']:
        """Return keys or values of both streams, text first."""
        return jnp.concatenate([self._heads(f'text_{part}', text), self._heads(f'image_{part}', image)], axis=1)

    def _residual(self, stream: str, x: Array, attended: Array, modulation: Modulation) -> Array:
        """Add the gated attention output, then the gated MLP."""
        width = self.config.width
        attended = nn.Dense(width, dtype=self.dtype, kernel_init=_XAVIER, name=f'{stream}_out')(attended)
        x = x + modulation.gate_attention.astype(x.dtype) * attended
        normed = _modulate(x, modulation.gain_mlp, modulation.shift_mlp)
        return x + modulation.gate_mlp.astype(x.dtype) * FeedForward(width, self.dtype, name=f'{stream}_mlp')(normed)


def _modulate(x: Array, gain: Array, shift: Array) -> Array:
    """Layer norm without learned parameters, then gain and shift."""
    return layer_norm(x) * gain.astype(x.dtype) + shift.astype(x.dtype)


class PyramidMMDiT(nn.Module):
    """The denoiser: predicts the flow of the current unit from its noisy latent, its history and the prompt.

    Attributes:
      config: sizes.
      dtype: compute type of the blocks; conditioning, norms and softmax stay float32.
      scan: run all blocks but the last as one scan over stacked parameters (fast to compile, for training and
        sampling) instead of one after the other (for export). `stack_blocks` and `unstack_blocks` convert parameters.
      remat: 'none', 'full' or 'dots': what a block recomputes in the backward pass.
    """

    config: MMDiTConfig
    dtype: Any = None
    scan: bool = False
    remat: str = 'none'

    def setup(self) -> None:
        config, repeated = self.config, self.config.num_layers - 1
        self.time_embed = ConditioningMLP(config.width)
        self.pooled_embed = ConditioningMLP(config.width)
        self.positions = self.param('positions', _positions_init, config)
        self.patch_embed = nn.Dense(config.width, dtype=self.dtype, kernel_init=_XAVIER)
        block = self._block_class()
        self.modulators: Any
        self.blocks: Any
        if self.scan and repeated:
            stacked: dict[str, Any] = {'variable_axes': {'params': 0}, 'split_rngs': {'params': True}}
            shared_by_all: Any = None
            per_block: Any = (0, *(nn.broadcast,) * 4)  # modulation; cos, sin, bias and keep are the same for all
            modulators = nn.vmap(BlockModulator, in_axes=shared_by_all, out_axes=0, axis_size=repeated, **stacked)
            blocks = nn.scan(block, in_axes=per_block, length=repeated, **stacked)
            self.modulators, self.blocks = modulators(), blocks(config, self.dtype)
        else:
            self.modulators = [BlockModulator() for _ in range(repeated)]
            self.blocks = [block(config, self.dtype) for _ in range(repeated)]
        self.last_modulator = BlockModulator(last=True)
        self.last_block = block(config, self.dtype, last=True)
        self.head_modulator = ModulationLinear(2)
        self.head = nn.Dense(config.patch_dim, dtype=self.dtype, kernel_init=_ZEROS)

    def _block_class(self) -> Any:
        if self.remat == 'none':
            return JointBlock
        if self.remat not in REMAT_POLICIES:
            raise InputError(f'remat is {self.remat!r}; use one of none, {", ".join(REMAT_POLICIES)}.')
        # Argument 6 is `keep` (self is 0). A scan already keeps XLA from undoing the recomputation.
        policy = REMAT_POLICIES[self.remat]
        return nn.remat(JointBlock, policy=policy, prevent_cse=not self.scan, static_argnums=(6,))

    def __call__(
        self,
        clips: Sequence[Float[Array, 'B _ _ _ C']],
        text: Float[Array, 'B L D'],
        text_mask: Int[Array, 'B L'],
        pooled: Float[Array, 'B p'],
        timestep: Float[Array, ' B'],
        frame_ids: Int[Array, 'B F'] | None = None,
    ) -> Float[Array, 'B _ _ _ C']:
        """Return the flow of the last clip.

        Args:
          clips: history, oldest first, then the noisy current unit; latents of any size divisible by the patch.
          text: prompt states from the context adapter.
          text_mask: 1 for valid text tokens.
          pooled: pooled prompt vector of the two CLIP towers.
          timestep: in 0..1000.
          frame_ids: index in the video of every latent frame over all clips; negative for padding frames. Default:
            0, 1, 2, ...
        Raises:
          InputError: there is no clip or a clip cannot be cut into patches.
        """
        patch = self.config.patch_size
        layout = layout_of(clips, patch, text.shape[1])
        if frame_ids is None:
            frame_ids = jnp.broadcast_to(jnp.arange(len(layout.grids)), (text.shape[0], len(layout.grids)))
        condition = self.condition(layout, frame_ids, text_mask, pooled, timestep)
        patches = jnp.concatenate([patchify(clip, patch) for clip in clips], axis=1)
        flow = self.denoise(patches, text, condition, layout.current_tokens)
        return unpatchify(flow, patch, layout.grids[-1])

    def condition(
        self,
        layout: Layout,
        frame_ids: Int[Array, 'B F'],
        text_mask: Int[Array, 'B L'],
        pooled: Float[Array, 'B p'],
        timestep: Float[Array, ' B'],
    ) -> Condition:
        """Compute everything in a call that does not depend on the latents or the text states."""
        config = self.config
        ids = position_ids(layout, frame_ids)
        cos, sin = (
            jnp.asarray(table)[jnp.clip(ids, 0)][:, :, None]
            for table in rotary_table(config.max_num_frames, config.attention_head_dim)
        )
        embedding = self.time_embed(timestep_sinusoid(timestep, TIMESTEP_WIDTH)) + self.pooled_embed(pooled)
        blocks = self.modulators(embedding) if self.scan else [modulator(embedding) for modulator in self.modulators]
        scale, shift = self.head_modulator(nn.silu(embedding))
        return Condition(
            positions=self._position_rows(layout),
            cos=cos,
            sin=sin,
            bias=attention_bias(attention_mask(ids, text_mask)),
            blocks=blocks,
            last_block=self.last_modulator(embedding),
            head=FinalModulation(1 + scale, shift),
        )

    def denoise(
        self, patches: Float[Array, '... I P'], text: Float[Array, '... L D'], condition: Condition, keep: int
    ) -> Float[Array, '... X P']:
        """Return the flow of the last `keep` image tokens, as patches.

        Args:
          patches: all clips cut into patches, oldest first; [I, P] for a batch of one.
          text: prompt states from the context adapter; [L, D] for a batch of one.
          condition: from `condition`.
          keep: image tokens of the current unit.
        """
        image = self.patch_embed(patches)
        image = image + condition.positions.astype(image.dtype)
        text = text.astype(image.dtype)
        shared = (condition.cos, condition.sin, condition.bias)
        streams = (image, text)
        tokens = image.shape[-2]
        if self.scan and self.config.num_layers > 1:
            streams, _ = self.blocks(streams, condition.blocks, *shared, tokens)
        else:
            for block, modulation in zip(self.blocks, condition.blocks, strict=True):
                streams, _ = block(streams, modulation, *shared, tokens)
        (image, _), _ = self.last_block(streams, condition.last_block, *shared, keep)
        return self.head(_modulate(image, condition.head.gain, condition.head.shift))

    def _position_rows(self, layout: Layout) -> Float[Array, 'I D']:
        """Return the positional row of every image token.

        The table is cropped to its centre at the current unit's grid; coarser history sees that crop resized
        (bilinear, no antialiasing). The table is stored with the weights and is not trained.
        """
        rows, columns = layout.grids[-1]
        size = self.config.pos_embed_max_size
        if rows > size or columns > size:
            raise InputError(f'a grid of {rows}x{columns} patches exceeds the positional table of {size}x{size}.')
        top, left = (size - rows) // 2, (size - columns) // 2
        crop = jax.lax.stop_gradient(self.positions)[top : top + rows, left : left + columns]
        resized = {
            grid: jax.image.resize(crop, (*grid, crop.shape[-1]), 'bilinear', antialias=False)
            if grid != (rows, columns)
            else crop
            for grid in dict.fromkeys(layout.grids)
        }
        return jnp.concatenate([resized[grid].reshape(-1, crop.shape[-1]) for grid in layout.grids])


def _positions_init(key: Array, config: MMDiTConfig) -> Float[Array, 'M M D']:
    """Return the fixed sine/cosine table (the key is unused: Flax passes it to every initialiser)."""
    del key
    base = config.sample_size // config.patch_size
    return jnp.asarray(sincos_table(config.pos_embed_max_size, config.width, base))


def stack_blocks(params: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return parameters of the unrolled form as parameters of the scanned form; host arrays stay on the host."""
    on_host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    stack = np.stack if on_host else jnp.stack
    stacked = dict(params)
    del params  # unless the caller keeps them, single parameters are freed as soon as their stack is there
    for name in ('blocks', 'modulators') if num_layers > 1 else ():
        trees: list[dict[Any, Any]] = [
            dict(traverse_util.flatten_dict(stacked.pop(f'{name}_{i}'))) for i in range(num_layers - 1)
        ]
        leaves = {path: stack([tree.pop(path) for tree in trees]) for path in list(trees[0])}
        stacked[name] = traverse_util.unflatten_dict(leaves)
    return stacked


def unstack_blocks(params: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return parameters of the scanned form as parameters of the unrolled form."""
    unrolled = dict(params)
    for name in ('blocks', 'modulators') if num_layers > 1 else ():
        tree = unrolled.pop(name)
        unrolled |= {f'{name}_{i}': jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(num_layers - 1)}
    return unrolled
