"""Sizes of the first-frame model: the UNet of SSD-1B and the image VAE of SDXL.

Field names are those of the released `config.json` files. The UNet's config also spells out its levels, because the
module and its rename table both follow them.
Source: SDXL, arXiv 2307.01952; SSD-1B, arXiv 2401.02677, which removes transformer blocks one by one.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.component import (
    LEVELS,
    ComponentConfig,
    Count,
    Counts,
    Epsilon,
    Names,
    Positive,
    Side,
    Width,
    Widths,
    require,
)

# SDXL's size conditioning: original size, crop corner and target size of a picture, (rows, columns) each.
SIZE_IDS = 6
# Fields of the UNet's config that must be None.
_ABSENT = (
    *('encoder_hid_dim', 'encoder_hid_dim_type', 'num_attention_heads', 'class_embed_type', 'num_class_embeds'),
    *('time_embedding_dim', 'time_embedding_act_fn', 'timestep_post_act', 'time_cond_proj_dim', 'cross_attention_norm'),
)

PerLevel = Count | Counts
# Transformer blocks: of all levels, of each level, or of each residual block of a level.
Depths = Count | Annotated[tuple[Count | Counts, ...], LEVELS]


@dataclasses.dataclass(frozen=True)
class Level:
    """One resolution of the UNet, on the way down or up.

    Attributes:
      features: channels that leave each residual block.
      inputs: channels that enter each residual block; on the way up a skip is part of them.
      depths: transformer blocks after each residual block; 0 stands for no transformer.
      heads: attention heads of the transformers.
      resamples: whether the level ends by halving the grid (down) or doubling it (up).
    """

    features: int
    inputs: tuple[int, ...]
    depths: tuple[int, ...]
    heads: int
    resamples: bool


@dataclasses.dataclass(frozen=True)
class UNetConfig(ComponentConfig):
    """UNet2DConditionModel of the SDXL family. The defaults are SSD-1B."""

    sample_size: Side = 128
    in_channels: Width = 4
    out_channels: Width = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: Names = ('DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D')
    mid_block_type: str = 'UNetMidBlock2D'
    up_block_types: Names = ('CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D')
    only_cross_attention: bool = False
    block_out_channels: Widths = (320, 640, 1280)
    layers_per_block: PerLevel = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    dropout: float = 0.0
    act_fn: str = 'silu'
    norm_num_groups: Width = 32
    norm_eps: Epsilon = 1e-5
    cross_attention_dim: Width = 2048
    transformer_layers_per_block: Depths = (1, 2, 4)
    reverse_transformer_layers_per_block: Depths | None = ((4, 4, 10), (2, 1, 1), 1)
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: PerLevel = (5, 10, 20)  # Despite its name, the number of heads.
    num_attention_heads: PerLevel | None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = True
    class_embed_type: str | None = None
    addition_embed_type: str | None = 'text_time'
    addition_time_embed_dim: Width = 256
    num_class_embeds: int | None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = 'default'
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = 'positional'
    time_embedding_dim: int | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: Width = 2816
    attention_type: str = 'default'
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: str | None = None
    addition_embed_type_num_heads: Width = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        off, on = (False,), (True,)
        require(self, mid_block_type=('UNetMidBlock2D',), act_fn=('silu',), addition_embed_type=('text_time',))
        require(self, time_embedding_type=('positional',), attention_type=('default',))
        require(self, resnet_time_scale_shift=('default',), flip_sin_to_cos=on, use_linear_projection=on)
        require(self, center_input_sample=off, only_cross_attention=off, dual_cross_attention=off)
        require(self, resnet_skip_time_act=off, class_embeddings_concat=off)
        require(self, freq_shift=(0,), downsample_padding=(1,), conv_in_kernel=(3,), conv_out_kernel=(3,))
        require(self, mid_block_scale_factor=(1,), resnet_out_scale_factor=(1,), dropout=(0,))
        require(self, upcast_attention=(None, False, True), mid_block_only_cross_attention=(None, False))
        require(self, **dict.fromkeys(_ABSENT, (None,)))
        if self.pooled_dim < 1:
            raise InputError(
                f'UNetConfig.projection_class_embeddings_input_dim is {self.projection_class_embeddings_input_dim}; '
                f'it must exceed the {SIZE_IDS * self.addition_time_embed_dim} numbers of the sizes.'
            )
        for level in (*self.down_levels, *self.up_levels):
            self._check_divisions(level)

    @property
    def embedding_width(self) -> int:
        """Width of the embedded timestep and sizes."""
        return 4 * self.block_out_channels[0]

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled prompt vector."""
        return self.projection_class_embeddings_input_dim - SIZE_IDS * self.addition_time_embed_dim

    @property
    def down_levels(self) -> tuple[Level, ...]:
        """Levels from the finest grid to the coarsest."""
        layers, heads = self._per_level('layers_per_block'), self._per_level('attention_head_dim')
        depths, types = self._per_level('transformer_layers_per_block'), self._per_level('down_block_types')
        levels, width = [], self.block_out_channels[0]
        for index, features in enumerate(self.block_out_channels):
            inputs = (width,) + (features,) * (layers[index] - 1)
            per_block = self._depths('down_block_types', types[index], depths[index], layers[index])
            levels.append(Level(features, inputs, per_block, heads[index], index + 1 < len(types)))
            width = features
        return tuple(levels)

    @property
    def up_levels(self) -> tuple[Level, ...]:
        """Levels from the coarsest grid to the finest; each has one residual block more than on the way down."""
        down = self.down_levels
        name = 'reverse_transformer_layers_per_block'
        if self.reverse_transformer_layers_per_block is None:
            depths = self._per_level('transformer_layers_per_block')[::-1]
            if not all(isinstance(depth, int) for depth in depths):
                raise InputError(f'UNetConfig.{name} is None; give it, for the levels on the way down are uneven.')
        else:
            depths = self._per_level(name)
        types = self._per_level('up_block_types')
        skips = [self.block_out_channels[0]]
        for level in down:
            skips += [level.features] * (len(level.inputs) + level.resamples)
        levels, width = [], down[-1].features
        for index, level in enumerate(down[::-1]):
            inputs = []
            for _ in range(len(level.inputs) + 1):
                inputs.append(width + skips.pop())
                width = level.features
            per_block = self._depths('up_block_types', types[index], depths[index], len(inputs))
            levels.append(Level(width, tuple(inputs), per_block, level.heads, index + 1 < len(types)))
        return tuple(levels)

    def _per_level(self, name: str) -> tuple[Any, ...]:
        """Return one value per level of a field that may also hold one value for all."""
        value, count = getattr(self, name), len(self.block_out_channels)
        values = value if isinstance(value, tuple) else (value,) * count
        if len(values) != count:
            raise InputError(f'UNetConfig.{name} has {len(values)} values for {count} levels; give as many.')
        return values

    def _depths(self, field: str, block: str, depth: int | tuple[int, ...], count: int) -> tuple[int, ...]:
        """Return the transformer blocks after each of `count` residual blocks of a level."""
        plain = 'DownBlock2D' if field == 'down_block_types' else 'UpBlock2D'
        if block == plain:
            return (0,) * count
        if block != f'CrossAttn{plain}':
            raise InputError(f'UNetConfig.{field} has {block!r}; supported: {plain}, CrossAttn{plain}.')
        depths = depth if isinstance(depth, tuple) else (depth,) * count
        if len(depths) != count or min(depths) < 1:
            raise InputError(
                f'UNetConfig: a {block} has transformer depths {list(depths)}; give {count} positive numbers.'
            )
        return depths

    def _check_divisions(self, level: Level) -> None:
        """Raise InputError unless heads and norm groups divide the channels."""
        for width in (*level.inputs, level.features):
            if width % self.norm_num_groups:
                raise InputError(f'UNetConfig.norm_num_groups {self.norm_num_groups} does not divide {width} channels.')
        if any(level.depths) and level.features % level.heads:
            raise InputError(f'UNetConfig.attention_head_dim {level.heads} does not divide {level.features} channels.')


@dataclasses.dataclass(frozen=True)
class ImageVAEConfig(ComponentConfig):
    """AutoencoderKL of SDXL: 8x8 compression of pictures."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    down_block_types: Names = ('DownEncoderBlock2D',) * 4
    up_block_types: Names = ('UpDecoderBlock2D',) * 4
    block_out_channels: Widths = (128, 256, 512, 512)
    layers_per_block: Count = 2
    act_fn: str = 'silu'
    latent_channels: Width = 4
    norm_num_groups: Width = 32
    sample_size: Side = 1024
    scaling_factor: Positive = 0.13025
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, act_fn=('silu',), use_quant_conv=(True,), use_post_quant_conv=(True,))
        require(self, mid_block_add_attention=(True,))
        require(self, shift_factor=(None,), latents_mean=(None,), latents_std=(None,))
        count = len(self.block_out_channels)
        for name, block in (('down_block_types', 'DownEncoderBlock2D'), ('up_block_types', 'UpDecoderBlock2D')):
            if getattr(self, name) != (block,) * count:
                raise InputError(f'ImageVAEConfig.{name} is {getattr(self, name)}; supported: {count} times {block}.')
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise InputError(
                f'ImageVAEConfig.norm_num_groups {self.norm_num_groups} does not divide {self.block_out_channels}.'
            )

    @property
    def spatial_factor(self) -> int:
        """Side of the square of pixels that one latent stands for."""
        return 2 ** (len(self.block_out_channels) - 1)


FULL_UNET = UNetConfig()
FULL_IMAGE_VAE = ImageVAEConfig()

TINY_UNET = UNetConfig(
    sample_size=16,
    block_out_channels=(8, 16, 16),
    norm_num_groups=4,
    cross_attention_dim=56,
    transformer_layers_per_block=(1, 1, 1),
    reverse_transformer_layers_per_block=((1, 1, 2), (2, 1, 1), 1),
    attention_head_dim=(1, 2, 2),
    addition_time_embed_dim=16,
    projection_class_embeddings_input_dim=124,
)
TINY_IMAGE_VAE = ImageVAEConfig(block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=64)
