"""Shapes and types of parameters and released tensors, without allocating them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from neodragon_jax.checkpoint.classes import COMPONENTS
from neodragon_jax.config.neodragon import (
    ComponentConfig,
)
from neodragon_jax.config.sdxl import SIZE_IDS
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.models.safety_checker import StableDiffusionSafetyChecker
from neodragon_jax.models.sdxl_unet import UNet2DConditionModel
from neodragon_jax.models.sdxl_vae import AutoencoderKL
from neodragon_jax.models.super_resolution import QuickSRNet
from neodragon_jax.models.t5 import T5Encoder, T5EncoderWithProjection
from neodragon_jax.models.teacher import TeacherMMDiT
from neodragon_jax.models.vae import CausalVAE

Params = dict[str, Any]


def tensor_shapes(module_class: str, config: ComponentConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Return released name -> shape of every tensor of a component, without allocating it."""
    component = COMPONENTS[module_class]
    flat = traverse_util.flatten_dict(abstract_params(component.build(config)))
    entries = component.entries(config)
    return jax.eval_shape(
        lambda flat: {entry.torch_name: entry.convert.to_torch(flat[entry.path]) for entry in entries}, flat
    )


def abstract_params(module: nn.Module) -> Params:
    """Return the shapes and types of a module's parameters, without allocating them."""
    return jax.eval_shape(lambda key: module.init(key, *example_inputs(module)), jax.random.key(0))['params']


def example_inputs(module: nn.Module) -> tuple[Any, ...]:
    """Return the smallest inputs that initialize every parameter of a module."""
    ids = jnp.zeros((1, 2), jnp.int32)
    if isinstance(module, PyramidMMDiT | TeacherMMDiT):
        config, patch = module.config, module.config.patch_size
        clips = [jnp.zeros((1, 1, patch, patch, config.in_channels))]
        text_width = config.width if isinstance(module, PyramidMMDiT) else config.joint_attention_dim
        text, pooled = jnp.zeros((1, 2, text_width)), jnp.zeros((1, config.pooled_projection_dim))
        return clips, text, ids, pooled, jnp.zeros(1)
    if isinstance(module, ContextAdapter):
        return (jnp.zeros((1, module.config.input_dims)),)
    if isinstance(module, CausalVAE):
        config = module.config
        side = 2 ** sum(config.encoder_spatial_down_sample)
        return (jnp.zeros((1, 1, side, side, config.encoder_in_channels)),)
    if isinstance(module, UNet2DConditionModel):
        config, side = module.config, 2 ** (len(module.config.block_out_channels) - 1)
        text, pooled = jnp.zeros((1, 2, config.cross_attention_dim)), jnp.zeros((1, config.pooled_dim))
        return jnp.zeros((1, side, side, config.in_channels)), jnp.zeros(1), text, pooled, jnp.zeros((1, SIZE_IDS))
    if isinstance(module, AutoencoderKL):
        side = module.config.spatial_factor
        return (jnp.zeros((1, side, side, module.config.in_channels)),)
    if isinstance(module, StableDiffusionSafetyChecker):
        return (jnp.zeros((1, module.config.image_size, module.config.image_size, 3)),)
    if isinstance(module, QuickSRNet):
        return (jnp.zeros((1, 1, 1, module.config.in_channels)),)
    if isinstance(module, T5Encoder | T5EncoderWithProjection):
        return ids, ids
    return (ids,)
