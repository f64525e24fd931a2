"""Sizes of the safety checker of Stable Diffusion: a CLIP vision tower and the concepts it looks for.

Field names are those of `vision_config` in the released `config.json`; the defaults are those of transformers, because
that file leaves out what equals them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from neodragon_jax.base.errors import InputError
from neodragon_jax.config.component import ComponentConfig, require

# What the published checker knows: pictures it refuses, and pictures that make it stricter about those.
CONCEPTS, SPECIAL_CONCEPTS = 17, 3

Config = TypeVar('Config', bound='SafetyCheckerConfig')


@dataclasses.dataclass(frozen=True)
class SafetyCheckerConfig(ComponentConfig):
    """StableDiffusionSafetyChecker: CLIP's vision tower with its projection, compared with stored concepts."""

    strict_keys: ClassVar[bool] = False

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = 'quick_gelu'
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    def __post_init__(self) -> None:
        require(self, hidden_act=('quick_gelu', 'gelu'))
        if self.image_size % self.patch_size:
            raise InputError(
                f'SafetyCheckerConfig.patch_size {self.patch_size} does not divide image_size {self.image_size}.'
            )

    @classmethod
    def from_json(cls: type[Config], values: Mapping[str, Any], source: str) -> Config:
        """Build from a `config.json`, whose sizes are one level down, except for the projection's width."""
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
