"""Table of the released classes: config, module, rename table and files of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint.names.convert import Entry
from neodragon_jax.checkpoint.names.mmdit import mmdit_names, teacher_names
from neodragon_jax.checkpoint.names.native_vae import native_vae_names
from neodragon_jax.checkpoint.names.safety_checker import safety_checker_names
from neodragon_jax.checkpoint.names.sdxl import image_vae_names, unet_names
from neodragon_jax.checkpoint.names.super_resolution import super_resolution_names
from neodragon_jax.checkpoint.names.text import (
    clip_names,
    context_adapter_names,
    t5_encoder_names,
    t5_names,
)
from neodragon_jax.checkpoint.names.vae import video_vae_names
from neodragon_jax.checkpoint.weights import WEIGHT_FILES
from neodragon_jax.config.neodragon import (
    CLIPTextConfig,
    ComponentConfig,
    ContextAdapterConfig,
    MMDiTConfig,
    T5Config,
    T5EncoderConfig,
    VideoVAEConfig,
)
from neodragon_jax.config.pyramid_flow import PyramidFlowVAEConfig, TeacherMMDiTConfig
from neodragon_jax.config.safety_checker import SafetyCheckerConfig
from neodragon_jax.config.sdxl import ImageVAEConfig, UNetConfig
from neodragon_jax.config.super_resolution import SuperResolutionConfig
from neodragon_jax.models.clip import CLIPTextModel
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.models.native_decoder import NativeVAE
from neodragon_jax.models.safety_checker import StableDiffusionSafetyChecker
from neodragon_jax.models.sdxl_unet import UNet2DConditionModel
from neodragon_jax.models.sdxl_vae import AutoencoderKL
from neodragon_jax.models.super_resolution import QuickSRNet
from neodragon_jax.models.t5 import T5Encoder, T5EncoderWithProjection
from neodragon_jax.models.teacher import TeacherMMDiT
from neodragon_jax.models.vae import VideoVAE


@dataclasses.dataclass(frozen=True)
class Component:
    """Mapping of a released class to its implementation here.

    Attributes:
      config: its sizes.
      module: its Flax module.
      names: (config, **options) -> its rename table.
      weight_file: name of its weight file when it is saved.
      transformers: whether `config.json` names the class in the style of transformers (`architectures`, a list) or of
        diffusers (`_class_name`).
      options: arguments of module and rename table besides the config.
    """

    config: type[ComponentConfig]
    module: type[nn.Module]
    names: Callable[..., list[Entry]]
    weight_file: str = WEIGHT_FILES[0]
    transformers: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def build(self, config: ComponentConfig) -> nn.Module:
        """Return the module with the given sizes."""
        return self.module(config, **self.options)  # pyright: ignore[reportCallIssue]

    def entries(self, config: ComponentConfig) -> list[Entry]:
        """Return the rename table for the given sizes: one entry per stored tensor."""
        return self.names(config, **self.options)


def _transformers(
    config: type[ComponentConfig], module: type[nn.Module], names: Callable[..., list[Entry]], **options: Any
) -> Component:
    """Return a component in the layout of transformers."""
    return Component(config, module, names, WEIGHT_FILES[1], transformers=True, options=options)


# Keys are the class names in `config.json`.
COMPONENTS: Mapping[str, Component] = MappingProxyType(
    {
        'PyramidMMDiT': Component(MMDiTConfig, PyramidMMDiT, mmdit_names),
        'ContextAdapter': Component(ContextAdapterConfig, ContextAdapter, context_adapter_names),
        'AsymmetricCausalVideoVAE': Component(VideoVAEConfig, VideoVAE, video_vae_names),
        'T5EncoderWithProjection': _transformers(T5Config, T5EncoderWithProjection, t5_names),
        'CLIPTextModel': _transformers(CLIPTextConfig, CLIPTextModel, clip_names, projection=False),
        'CLIPTextModelWithProjection': _transformers(CLIPTextConfig, CLIPTextModel, clip_names, projection=True),
        'UNet2DConditionModel': Component(UNetConfig, UNet2DConditionModel, unet_names),
        'AutoencoderKL': Component(ImageVAEConfig, AutoencoderKL, image_vae_names),
        'QuickSRNet': Component(SuperResolutionConfig, QuickSRNet, super_resolution_names),
        'StableDiffusionSafetyChecker': _transformers(
            SafetyCheckerConfig, StableDiffusionSafetyChecker, safety_checker_names
        ),
        # The teacher's components, as Pyramid-Flow released them.
        'PyramidDiffusionMMDiT': Component(TeacherMMDiTConfig, TeacherMMDiT, teacher_names),
        'CausalVideoVAE': Component(PyramidFlowVAEConfig, NativeVAE, native_vae_names),
        'T5EncoderModel': _transformers(T5EncoderConfig, T5Encoder, t5_encoder_names),
    }
)


def class_name(module: nn.Module) -> str:
    """Return the released class name of a module.

    Raises:
      InputError: the module is not one of the released components.
    """
    for name, component in COMPONENTS.items():
        options = component.options.items()
        if type(module) is component.module and all(getattr(module, key) == value for key, value in options):
            return name
    raise InputError(f'{type(module).__name__} is not a released component; use one of {", ".join(COMPONENTS)}.')


def class_names(kind: type[nn.Module]) -> list[str]:
    """Return the released class names of a module class and its subclasses."""
    return [name for name, component in COMPONENTS.items() if issubclass(component.module, kind)]
