"""Sizes of every component: one frozen dataclass each, and the presets FULL and TINY.

Field names are those of the released `config.json` files, so that reading and writing them is a plain copy.
FULL is the released system (Neodragon, arXiv 2511.06055, table 1); TINY is the miniature checkpoint that ships with
the project. The two differ in numbers only: no code asks which one it is running.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.component import ComponentConfig, require


@dataclasses.dataclass(frozen=True)
class MMDiTConfig(ComponentConfig):
    """PyramidMMDiT: the SD3-style joint-attention denoiser."""

    num_layers: int = 18
    num_attention_heads: int = 24
    attention_head_dim: int = 64
    in_channels: int = 16
    patch_size: int = 2
    sample_size: int = 128
    pos_embed_max_size: int = 192
    max_num_frames: int = 200
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1536
    pooled_projection_dim: int = 2048
    qk_norm: str = 'rms_norm'
    pos_embed_type: str = 'sincos'
    temp_pos_embed_type: str = 'rope'
    add_temp_pos_embed: bool = True
    interp_condition_pos: bool = True
    use_t5_mask: bool = True
    use_temporal_causal: bool = True
    use_gradient_checkpointing: bool = False
    gradient_checkpointing_ratio: float = 0.6

    def __post_init__(self) -> None:
        require(
            self,
            qk_norm=('rms_norm',),
            pos_embed_type=('sincos',),
            temp_pos_embed_type=('rope',),
            add_temp_pos_embed=(True,),
            interp_condition_pos=(True,),
            use_t5_mask=(True,),
            use_temporal_causal=(True,),
        )
        if self.attention_head_dim % 2:
            raise InputError(
                f'MMDiTConfig.attention_head_dim is {self.attention_head_dim}; rotary pairs need an even one.'
            )
        if self.num_layers < 1:
            raise InputError(f'MMDiTConfig.num_layers is {self.num_layers}; at least one block is needed.')

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

    input_dims: int = 4096
    output_dims: int = 1536
    layer_depths: tuple[int, ...] = (4096, 4096, 4096, 4096)
    skips: tuple[bool, ...] = (True, True, True, True)
    use_biases: bool = True
    pre_activation: bool = False
    activation_fn: str = 'gelu'
    out_activation_fn: str = 'linear'

    def __post_init__(self) -> None:
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

    vocab_size: int = 32128
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 12
    num_heads: int = 12
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dropout_rate: float = 0.1
    feed_forward_proj: str = 'gated-gelu'
    pad_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        require(self, feed_forward_proj=('gated-gelu',))


@dataclasses.dataclass(frozen=True)
class T5Config(T5EncoderConfig):
    """DT5: a T5 v1.1 encoder followed by a two-layer projection of width `out_dim`."""

    out_dim: int = dataclasses.field(kw_only=True)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `config.json`; the projection's widths are repeated under the reference's names."""
        return super().to_json() | {'project_in_dim': self.d_model, 'project_out_dim': self.out_dim}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(ComponentConfig):
    """CLIP text tower. Whether it ends with a projection is told by its class, not by its sizes."""

    strict_keys: ClassVar[bool] = False
    constant_keys: ClassVar[Mapping[str, Any]] = MappingProxyType({'model_type': 'clip_text_model'})

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    projection_dim: int = 768
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    hidden_act: str = 'quick_gelu'
    bos_token_id: int = 0
    eos_token_id: int = 2
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        require(self, hidden_act=('quick_gelu', 'gelu'))


@dataclasses.dataclass(frozen=True)
class CausalEncoderConfig(ComponentConfig):
    """The causal 3-D encoder, which Neodragon's video VAE has unchanged from Pyramid-Flow's."""

    encoder_in_channels: int = 3
    encoder_out_channels: int = 16
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    encoder_down_block_types: tuple[str, ...] = ('DownEncoderBlockCausal3D',) * 4
    encoder_spatial_down_sample: tuple[bool, ...] = (True, True, True, False)
    encoder_temporal_down_sample: tuple[bool, ...] = (True, True, True, False)
    encoder_block_dropout: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    encoder_act_fn: str = 'silu'
    encoder_norm_num_groups: int = 32

    def __post_init__(self) -> None:
        blocks = ('DownEncoderBlockCausal3D',) * len(self.encoder_block_out_channels)
        require(self, encoder_act_fn=('silu',), encoder_down_block_types=(blocks,))


@dataclasses.dataclass(frozen=True)
class VideoVAEConfig(CausalEncoderConfig):
    """Asymmetric causal video VAE: a causal 3-D encoder and the TinyAEHV decoder."""

    decoder_num_features: tuple[int, ...] = (256, 128, 64, 64)
    decoder_time_upscale: tuple[bool, ...] = (True, True, True)
    decoder_space_upscale: tuple[bool, ...] = (True, True, True)
    sample_size: int = 256
    temporal_downsample_scale: int = 8
    spatial_downsample_scale: int = 8


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
