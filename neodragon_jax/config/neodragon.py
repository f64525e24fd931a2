"""Sizes of every component: one frozen dataclass each, and the presets FULL and TINY.

Field names are those of the released `config.json` files, so that reading and writing them is a plain copy.
FULL is the released system (Neodragon, arXiv 2511.06055, table 1); TINY is the miniature checkpoint that ships with
the project. They differ only in numbers: no code depends on the preset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.component import (
    ComponentConfig,
    Count,
    Epsilon,
    Flags,
    Layers,
    Names,
    Rate,
    Rates,
    Side,
    TokenId,
    Vocabulary,
    Width,
    Widths,
    require,
    require_divisor,
    require_lengths,
)


@dataclasses.dataclass(frozen=True)
class MMDiTConfig(ComponentConfig):
    """PyramidMMDiT: the SD3-style joint-attention denoiser.

    Attributes:
      num_layers: blocks.
      num_attention_heads: heads.
      attention_head_dim: width of a head, even.
      in_channels: channels of the latents.
      sample_size: side of the latent grid whose positions have the scale 1.
      pos_embed_max_size: rows and columns of patches that have positions.
      joint_attention_dim: width of the text states before the context embedder or adapter.
      caption_projection_dim: width of the text states that the blocks read: heads x head width.
      pooled_projection_dim: width of the pooled vector, of both CLIP towers together.
    """

    num_layers: Count = 18
    num_attention_heads: Count = 24
    attention_head_dim: Width = 64
    in_channels: Width = 16
    patch_size: Annotated[int, Field(ge=1, le=64)] = 2
    sample_size: Side = 128
    pos_embed_max_size: Side = 192
    max_num_frames: Side = 200
    joint_attention_dim: Width = 4096
    caption_projection_dim: Width = 1536
    pooled_projection_dim: Width = 2048
    qk_norm: str = 'rms_norm'
    pos_embed_type: str = 'sincos'
    temp_pos_embed_type: str = 'rope'
    add_temp_pos_embed: bool = True
    interp_condition_pos: bool = True
    use_t5_mask: bool = True
    use_temporal_causal: bool = True
    use_gradient_checkpointing: bool = False
    gradient_checkpointing_ratio: Annotated[float, Field(ge=0, le=1)] = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            qk_norm=('rms_norm',),
            pos_embed_type=('sincos',),
            temp_pos_embed_type=('rope',),
            add_temp_pos_embed=(True,),
            interp_condition_pos=(True,),
            use_t5_mask=(True,),
            use_temporal_causal=(True,),
            caption_projection_dim=(self.width,),
        )
        if self.attention_head_dim % 2:
            raise InputError(
                f'MMDiTConfig.attention_head_dim is {self.attention_head_dim}; rotary pairs need an even one.'
            )
        if self.width % 4:
            raise InputError(f'MMDiTConfig: width {self.width} (heads x head dim); the positional table needs 4 n.')
        if self.sample_size < self.patch_size:
            raise InputError(f'MMDiTConfig.sample_size {self.sample_size} is below patch_size {self.patch_size}.')
        # At most 1 GB in float32; the released table has a fifth of it.
        if self.pos_embed_max_size**2 * self.width > 2**28:
            raise InputError(
                f'MMDiTConfig.pos_embed_max_size {self.pos_embed_max_size}: a positional table of this size and width '
                f'{self.width} has more than 2^28 numbers. Copy the file again.'
            )

    @property
    def width(self) -> int:
        """D, the width of both token streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: patch_size^2 * in_channels."""
        return self.patch_size**2 * self.in_channels


@dataclasses.dataclass(frozen=True)
class ContextAdapterConfig(ComponentConfig):
    """ContextAdapter: an MLP with dense skips from the text states to the denoiser's width."""

    input_dims: Width = 4096
    output_dims: Width = 1536
    layer_depths: Annotated[tuple[Width, ...], Field(max_length=64)] = (4096, 4096, 4096, 4096)
    skips: Annotated[tuple[bool, ...], Field(max_length=64)] = (True, True, True, True)
    use_biases: bool = True
    pre_activation: bool = False
    activation_fn: str = 'gelu'
    out_activation_fn: str = 'linear'

    def __post_init__(self) -> None:
        super().__post_init__()
        activations = ('gelu', 'silu', 'relu', 'tanh', 'linear')
        require(self, activation_fn=activations, out_activation_fn=activations)
        if len(self.skips) != len(self.layer_depths):
            raise InputError(
                f'ContextAdapterConfig: {len(self.skips)} skips for {len(self.layer_depths)} layers; give as many.'
            )


@dataclasses.dataclass(frozen=True)
class T5EncoderConfig(ComponentConfig):
    """A T5 v1.1 encoder; the defaults are those of T5-Base."""

    strict_keys: ClassVar[bool] = False
    constant_keys: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {'model_type': 't5', 'dense_act_fn': 'gelu_new', 'is_gated_act': True, 'is_encoder_decoder': False}
    )

    vocab_size: Vocabulary = 32128
    d_model: Width = 768
    d_kv: Width = 64
    d_ff: Width = 2048
    num_layers: Count = 12
    num_heads: Count = 12
    relative_attention_num_buckets: Annotated[int, Field(ge=4, le=2**12, multiple_of=4)] = 32
    relative_attention_max_distance: Annotated[int, Field(ge=2, le=2**16)] = 128
    layer_norm_epsilon: Epsilon = 1e-6
    dropout_rate: Rate = 0.1
    feed_forward_proj: str = 'gated-gelu'
    pad_token_id: TokenId = 0
    eos_token_id: TokenId = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, feed_forward_proj=('gated-gelu',))
        # A divisor: the logarithm of max distance over the number of exact buckets of a sign.
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise InputError(
                f'{type(self).__name__}.relative_attention_max_distance {self.relative_attention_max_distance} is not '
                f'above a quarter of relative_attention_num_buckets {self.relative_attention_num_buckets}.'
            )


@dataclasses.dataclass(frozen=True)
class T5Config(T5EncoderConfig):
    """DT5: a T5 v1.1 encoder followed by a two-layer projection of width `out_dim`."""

    out_dim: Width = dataclasses.field(kw_only=True)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `config.json`; the projection's widths are repeated under the reference's names."""
        return super().to_json() | {'project_in_dim': self.d_model, 'project_out_dim': self.out_dim}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(ComponentConfig):
    """CLIP text tower. The released class, not these sizes, determines whether it ends with a projection."""

    strict_keys: ClassVar[bool] = False
    constant_keys: ClassVar[Mapping[str, Any]] = MappingProxyType({'model_type': 'clip_text_model'})

    vocab_size: Vocabulary = 49408
    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    projection_dim: Width = 768
    max_position_embeddings: Side = 77
    layer_norm_eps: Epsilon = 1e-5
    hidden_act: str = 'quick_gelu'
    bos_token_id: TokenId = 0
    eos_token_id: TokenId = 2
    pad_token_id: TokenId = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, hidden_act=('quick_gelu', 'gelu'))
        require_divisor(self, 'num_attention_heads', 'hidden_size')


@dataclasses.dataclass(frozen=True)
class CausalEncoderConfig(ComponentConfig):
    """Causal 3-D encoder, the same in Neodragon's and Pyramid-Flow's video VAE.

    Attributes:
      encoder_in_channels: colors.
      encoder_out_channels: channels of the latents.
      encoder_block_out_channels: channels of each level, full resolution first.
      encoder_layers_per_block: residual blocks of each level.
      encoder_down_block_types: class of each level.
      encoder_spatial_down_sample: whether a level halves height and width.
      encoder_temporal_down_sample: whether a level halves the frames.
      encoder_block_dropout: probability of dropping an activation, by level.
      encoder_act_fn: activation.
      encoder_norm_num_groups: groups of a group norm.
    """

    encoder_in_channels: Literal[3] = 3
    encoder_out_channels: Width = 16
    encoder_block_out_channels: Widths = (128, 256, 512, 512)
    encoder_layers_per_block: Layers = (2, 2, 2, 2)
    encoder_down_block_types: Names = ('DownEncoderBlockCausal3D',) * 4
    encoder_spatial_down_sample: Flags = (True, True, True, False)
    encoder_temporal_down_sample: Flags = (True, True, True, False)
    encoder_block_dropout: Rates = (0.0, 0.0, 0.0, 0.0)
    encoder_act_fn: str = 'silu'
    encoder_norm_num_groups: Width = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks = ('DownEncoderBlockCausal3D',) * len(self.encoder_block_out_channels)
        require(self, encoder_act_fn=('silu',), encoder_down_block_types=(blocks,))
        per_level = ('layers_per_block', 'spatial_down_sample', 'temporal_down_sample', 'block_dropout')
        require_lengths(self, 'encoder_block_out_channels', *(f'encoder_{name}' for name in per_level))
        require_divisor(self, 'encoder_norm_num_groups', 'encoder_block_out_channels')


@dataclasses.dataclass(frozen=True)
class VideoVAEConfig(CausalEncoderConfig):
    """Asymmetric causal video VAE: a causal 3-D encoder and the TinyAEHV decoder."""

    decoder_num_features: Annotated[tuple[Width, ...], Field(min_length=2, max_length=16)] = (256, 128, 64, 64)
    decoder_time_upscale: Flags = (True, True, True)
    decoder_space_upscale: Flags = (True, True, True)
    sample_size: Side = 256
    temporal_downsample_scale: Annotated[int, Field(ge=1, le=64)] = 8
    spatial_downsample_scale: Annotated[int, Field(ge=1, le=64)] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, scale, down, up in (
            ('temporal', self.temporal_downsample_scale, self.encoder_temporal_down_sample, self.decoder_time_upscale),
            ('spatial', self.spatial_downsample_scale, self.encoder_spatial_down_sample, self.decoder_space_upscale),
        ):
            if not 2 ** sum(down) == 2 ** sum(up) == scale:
                raise InputError(
                    f'VideoVAEConfig.{name}_downsample_scale is {scale}; the encoder halves {sum(down)} times and the '
                    f'decoder doubles {sum(up)} times: give factors that agree.'
                )
        growing = len(self.decoder_num_features) - 1
        if not len(self.decoder_time_upscale) == len(self.decoder_space_upscale) == growing:
            raise InputError(
                f'VideoVAEConfig.decoder_num_features has {len(self.decoder_num_features)} entries; '
                f'decoder_time_upscale and decoder_space_upscale need {growing}, one less.'
            )


@dataclasses.dataclass(frozen=True)
class SystemConfig:
    """Sizes of the components that turn a prompt into a video."""

    denoiser: MMDiTConfig
    context_adapter: ContextAdapterConfig
    video_vae: VideoVAEConfig
    t5: T5Config
    clip_l: CLIPTextConfig
    clip_g: CLIPTextConfig


FULL = SystemConfig(
    denoiser=MMDiTConfig(),
    context_adapter=ContextAdapterConfig(),
    video_vae=VideoVAEConfig(),
    t5=T5Config(out_dim=4096),
    clip_l=CLIPTextConfig(),
    clip_g=CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act='gelu',
    ),
)

TINY = SystemConfig(
    denoiser=MMDiTConfig(
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=16,
        sample_size=16,
        pos_embed_max_size=24,
        joint_attention_dim=40,
        caption_projection_dim=64,
        pooled_projection_dim=48,
    ),
    context_adapter=ContextAdapterConfig(input_dims=40, output_dims=64, layer_depths=(48, 48), skips=(True, True)),
    video_vae=VideoVAEConfig(
        encoder_block_out_channels=(8, 8, 8, 8),
        encoder_layers_per_block=(1, 1, 1, 1),
        encoder_norm_num_groups=4,
        decoder_num_features=(16, 12, 8, 8),
        sample_size=64,
    ),
    t5=T5Config(out_dim=40, vocab_size=1024, d_model=48, d_kv=12, d_ff=96, num_layers=3, num_heads=4),
    clip_l=CLIPTextConfig(
        vocab_size=1014,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        projection_dim=20,
    ),
    clip_g=CLIPTextConfig(
        vocab_size=1014,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=28,
        hidden_act='gelu',
    ),
)
