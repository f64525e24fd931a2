"""PyramidMMDiT: the joint-attention denoiser of Neodragon (SD3-style blocks, blockwise causal over frames).

Two entry points share one definition. `condition` computes everything that depends only on the prompt, the timestep
and the position in the video: positions, rotary embedding, attention mask, modulation. `denoise` computes the rest and
is the phone graph, with the result of `condition` as inputs. Training and sampling call both in one compiled function.

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

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.models.attention import strategy
from neodragon_jax.models.joint_block import STREAMS, JointBlock
from neodragon_jax.models.layers import sincos_table, timestep_sinusoid
from neodragon_jax.models.modulation import (
    EXACT,
    TWO_PARTS,
    BlockModulation,
    BlockModulator,
    ConditioningMLP,
    FinalModulation,
    ModulationLinear,
    modulate,
)
from neodragon_jax.models.rotary import make_rotary
from neodragon_jax.models.splash import OUTPUT
from neodragon_jax.pyramid.layout import Layout, layout_of, patchify, position_ids, unpatchify

TIMESTEP_WIDTH = 256
_XAVIER = nn.initializers.xavier_uniform()
_ZEROS = nn.initializers.zeros_init()

# Residuals that rematerialization keeps from the forward pass of a block.
_ATTENTION = jax.checkpoint_policies.save_only_these_names(OUTPUT)
REMAT_POLICIES = {
    'full': jax.checkpoint_policies.nothing_saveable,
    'kernel': _ATTENTION,
    'dots': jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ATTENTION
    ),
}


class Condition(NamedTuple):
    """All inputs of `denoise` that do not depend on the latents.

    Attributes:
      positions: [I, D], rows of the positional table.
      rotary: rotary embedding of the image tokens, in the form that the module selects.
      bias: added to the attention scores, as the module's attention strategy takes it; 'masked': [B, 1, S, S].
      blocks: modulation of all blocks but the last: one BlockModulation of arrays [blocks, B, 1, D] if the blocks
        are scanned, else a sequence of them.
      last_block: modulation of the last block.
      head: modulation of the output norm.
    """

    positions: Array
    rotary: Any
    bias: Any
    blocks: Any
    last_block: BlockModulation
    head: FinalModulation


class PyramidMMDiT(nn.Module):
    """The denoiser: predicts the flow of the current unit from its noisy latent, its history and the prompt.

    Attributes:
      config: sizes.
      dtype: compute type of the blocks; conditioning, norms and softmax stay float32.
      scan: run all blocks but the last as one scan over stacked parameters (fast to compile, for training and
        sampling) instead of one after the other (for export). `stack_blocks` and `unstack_blocks` convert parameters.
      remat: rematerialization of a block in the backward pass: 'none', 'full', 'kernel' (all but the output of the
        attention kernel), or 'dots' (all but that and matrix products).
      attention: how the mask is applied, see models/attention.py; all but 'masked' take frames in the order of their
        ids, as `pyramid.history.envelope` has them.
      rotary: form of the rotary embedding, see `rotary.make_rotary`.
      residual_dtype: type of both token streams between the layers, and of the head; None for the compute type. In
        float32, rounding does not add up over the blocks; the matrix products of the blocks keep the compute type.
    """

    config: MMDiTConfig
    dtype: Any = None
    scan: bool = False
    remat: str = 'none'
    attention: str = 'masked'
    rotary: str = 'halves'
    residual_dtype: Any = None

    def setup(self) -> None:
        config, repeated = self.config, self.config.num_layers - 1
        self.time_embed = ConditioningMLP(config.width)
        self.pooled_embed = ConditioningMLP(config.width)
        self.positions = self.param('positions', _positions_init, config)
        self.patch_embed = nn.Dense(config.width, dtype=self.dtype, kernel_init=_XAVIER)
        block = _block_class(self.remat, self.scan)
        self.modulators: Any
        self.blocks: Any
        if self.scan and repeated:
            stacked: dict[str, Any] = {
                'variable_axes': {'params': 0, 'intermediates': 0},
                'split_rngs': {'params': True},
            }
            shared_by_all: Any = None
            per_block: Any = (0, *(nn.broadcast,) * 3)  # modulation; rotary, bias and keep are the same for all
            modulators = nn.vmap(BlockModulator, in_axes=shared_by_all, out_axes=0, axis_size=repeated, **stacked)
            blocks = nn.scan(block, in_axes=per_block, length=repeated, **stacked)
            self.modulators, self.blocks = modulators(), blocks(config, self.dtype, attention=self.attention)
        else:
            self.modulators = [BlockModulator() for _ in range(repeated)]
            self.blocks = [block(config, self.dtype, attention=self.attention) for _ in range(repeated)]
        self.last_modulator = BlockModulator(last=True)
        self.last_block = block(config, self.dtype, last=True, attention=self.attention)
        self.head_modulator = ModulationLinear(TWO_PARTS)
        head_dtype, head_precision = self.residual_dtype or self.dtype, EXACT if self.residual_dtype else None
        self.head = nn.Dense(config.patch_dim, dtype=head_dtype, precision=head_precision, kernel_init=_ZEROS)

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
        modulation = self.modulate(timestep_sinusoid(timestep, TIMESTEP_WIDTH), pooled)
        return self.modulated(clips, text, text_mask, modulation, frame_ids)

    def modulated(
        self,
        clips: Sequence[Float[Array, 'B _ _ _ C']],
        text: Float[Array, 'B L D'],
        text_mask: Int[Array, 'B L'],
        modulation: tuple[Any, BlockModulation, FinalModulation],
        frame_ids: Int[Array, 'B F'] | None = None,
    ) -> Float[Array, 'B _ _ _ C']:
        """Return the flow of the last clip with given AdaLN vectors, a result of `modulate`."""
        patch = self.config.patch_size
        layout = layout_of(clips, patch, text.shape[1])
        if frame_ids is None:
            frame_ids = jnp.broadcast_to(jnp.arange(len(layout.grids)), (text.shape[0], len(layout.grids)))
        condition = self._condition(layout, frame_ids, text_mask, modulation)
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
        """Compute the inputs of `denoise` that do not depend on the latents or the text states."""
        modulation = self.modulate(timestep_sinusoid(timestep, TIMESTEP_WIDTH), pooled)
        return self._condition(layout, frame_ids, text_mask, modulation)

    def _condition(self, layout: Layout, frame_ids: Array, text_mask: Array, modulation: Any) -> Condition:
        rotary, bias = rotary_and_bias(self, layout, position_ids(layout, frame_ids), text_mask)
        return Condition(self.position_rows(layout), rotary, bias, *modulation)

    def modulate(
        self, sinusoid: Float[Array, 'B t'], pooled: Float[Array, 'B p']
    ) -> tuple[Any, BlockModulation, FinalModulation]:
        """Return the AdaLN vectors of all blocks but the last, of the last, and of the head, as Condition has them.

        Args:
          sinusoid: embedded timestep, `timestep_sinusoid(timestep, TIMESTEP_WIDTH)`.
          pooled: pooled prompt vector.
        """
        embedding = self.embed_conditioning(sinusoid, pooled)
        stacked = self.scan and self.config.num_layers > 1
        blocks = self.modulators(embedding) if stacked else [modulator(embedding) for modulator in self.modulators]
        return blocks, *self.modulate_end(embedding)

    def embed_conditioning(self, sinusoid: Float[Array, 'B t'], pooled: Float[Array, 'B p']) -> Float[Array, 'B D']:
        """Return the vector from which all modulation is computed. Arguments as in `modulate`."""
        return self.time_embed(sinusoid) + self.pooled_embed(pooled)

    def modulate_end(self, embedding: Float[Array, 'B D']) -> tuple[BlockModulation, FinalModulation]:
        """Return the AdaLN vectors of the last block and of the head."""
        return self.last_modulator(embedding), FinalModulation(*self.head_modulator(nn.silu(embedding)))

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
        image = self.embed(patches, condition.positions)
        streams = (image, text.astype(image.dtype))
        self.sow('intermediates', STREAMS, streams)
        shared = (condition.rotary, condition.bias)
        tokens = image.shape[-2]
        if self.scan and self.config.num_layers > 1:
            streams, _ = self.blocks(streams, condition.blocks, *shared, tokens)
        else:
            for block, modulation in zip(self.blocks, condition.blocks, strict=True):
                streams, _ = block(streams, modulation, *shared, tokens)
        return self.finish(streams, condition.last_block, condition.head, *shared, keep)

    def embed(self, patches: Float[Array, '... I P'], positions: Float[Array, 'I D']) -> Float[Array, '... I D']:
        """Return the image stream before the first block."""
        image = self.patch_embed(patches)
        if self.residual_dtype is not None:
            image = image.astype(self.residual_dtype)
        return image + positions.astype(image.dtype)

    def finish(
        self,
        streams: tuple[Float[Array, '... I D'], Float[Array, '... L D']],
        modulation: BlockModulation,
        head: FinalModulation,
        rotary: Any,
        bias: Any,
        keep: int,
    ) -> Float[Array, '... X P']:
        """Run the last block and the head on the last `keep` image tokens."""
        (image, _), _ = self.last_block(streams, modulation, rotary, bias, keep)
        return self.head(modulate(image, head.gain, head.shift))

    def position_rows(self, layout: Layout) -> Float[Array, 'I D']:
        """Return the positional row of every image token.

        The table is cropped to its center at the current unit's grid; coarser history sees that crop resized
        (bilinear, no antialiasing). The table is stored with the weights and is not trained.

        Raises:
          InputError: the grid is larger than the table.
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


def rotary_and_bias(
    model: PyramidMMDiT, layout: Layout, ids: Int[Array, 'B S'], text_mask: Int[Array, 'B L']
) -> tuple[Any, Any]:
    """Return rotary embedding and attention bias as the model's blocks take them; no parameters are needed."""
    config, attention = model.config, strategy(model.attention)
    sizes = config.max_num_frames, config.attention_head_dim
    rotary = make_rotary(model.rotary, layout, ids, *sizes, order=attention.order)
    return rotary, attention.bias(layout, ids, text_mask, config.num_attention_heads)


def _block_class(remat: str, scan: bool) -> Any:
    """Return the block, with its rematerialization."""
    if remat == 'none':
        return JointBlock
    if remat not in REMAT_POLICIES:
        raise InputError(f'remat is {remat!r}; use one of none, {", ".join(REMAT_POLICIES)}.')
    # Argument 5 is `keep` (self is 0). A scan already keeps XLA from undoing the recomputation.
    return nn.remat(JointBlock, policy=REMAT_POLICIES[remat], prevent_cse=not scan, static_argnums=(5,))


def _positions_init(key: Array, config: MMDiTConfig) -> Float[Array, 'M M D']:
    """Return the fixed sine/cosine table (the key is unused: Flax passes it to every initializer)."""
    del key
    base = config.sample_size // config.patch_size
    return jnp.asarray(sincos_table(config.pos_embed_max_size, config.width, base))


def stack_blocks(params: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return parameters of the unrolled form as parameters of the scanned form; host arrays stay on the host."""
    on_host = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    stack = np.stack if on_host else jnp.stack
    stacked = dict(params)
    del params  # Single parameters are freed as soon as they are stacked, unless the caller holds references.
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
