"""Sizes of the safety checker of Stable Diffusion: a CLIP vision tower and the concepts it detects.

Field names are those of `vision_config` in the released `config.json`. The defaults are those of transformers, because
the file omits values that equal its defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.component import ComponentConfig, Count, Epsilon, Side, Width, require, require_divisor

# Concepts of the published checker: those it refuses, and special ones that lower the thresholds of the others.
CONCEPTS, SPECIAL_CONCEPTS = 17, 3

Config = TypeVar('Config', bound='SafetyCheckerConfig')


@dataclasses.dataclass(frozen=True)
class SafetyCheckerConfig(ComponentConfig):
    """StableDiffusionSafetyChecker: CLIP's vision tower with its projection, compared with stored concepts."""

    strict_keys: ClassVar[bool] = False

    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    image_size: Side = 224
    patch_size: Side = 32
    hidden_act: str = 'quick_gelu'
    layer_norm_eps: Epsilon = 1e-5
    projection_dim: Width = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, hidden_act=('quick_gelu', 'gelu'))
        require_divisor(self, 'num_attention_heads', 'hidden_size')
        require_divisor(self, 'patch_size', 'image_size')

    @classmethod
    def from_json(cls: type[Config], values: Mapping[str, Any], source: str) -> Config:
        """Build from a `config.json`, which nests all sizes but the projection's width in `vision_config`."""
        vision = values.get('vision_config')
        if not isinstance(vision, Mapping):
            raise InputError(f'{source}: missing key "vision_config". Copy the file from the release again.')
        top = {key: values[key] for key in ('projection_dim',) if key in values}
        return super().from_json({**vision, **top}, source)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `config.json`, without metadata keys."""
        sizes = super().to_json()
        return {
            'model_type': 'clip',
            'projection_dim': self.projection_dim,
            'vision_config': {'model_type': 'clip_vision_model', **sizes},
        }

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


# ViT-L/14, as published.
FULL_SAFETY_CHECKER = SafetyCheckerConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    patch_size=14,
    projection_dim=768,
)
