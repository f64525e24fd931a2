"""Text encoders and context adapters of the goldens, and their rename tables."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from safetensors.numpy import load_file

from neodragon_jax.checkpoint.names.convert import Entry
from neodragon_jax.checkpoint.names.text import (
    clip_names,
    context_adapter_names,
    t5_names,
)
from neodragon_jax.config.neodragon import CLIPTextConfig, ContextAdapterConfig, T5Config
from neodragon_jax.models.clip import CLIPTextModel
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.t5 import T5EncoderWithProjection
from support.goldens import GOLDENS

TOLERANCE = 2e-5
IDS = jax.ShapeDtypeStruct((1, 16), jnp.int32)


def build(kind: str, config) -> tuple[nn.Module, list[Entry], tuple]:
    """Return module, rename table and abstract inputs of one kind of component."""
    if kind == 't5':
        return T5EncoderWithProjection(config), t5_names(config), (IDS, IDS)
    if kind == 'adapter':
        inputs = (jax.ShapeDtypeStruct((2, config.input_dims), jnp.float32),)
        return ContextAdapter(config), context_adapter_names(config), inputs
    projection = kind == 'clip_projected'
    return CLIPTextModel(config, projection), clip_names(config, projection), (IDS,)


CONFIGS = {
    't5': T5Config,
    'adapter': ContextAdapterConfig,
    'clip': CLIPTextConfig,
    'clip_projected': CLIPTextConfig,
}
STORED = {
    'dt5': 't5',
    'clip_1': 'clip_projected',
    'clip_2': 'clip_projected',
    'ctxadapter_default': 'adapter',
    'ctxadapter_skips_mixed': 'adapter',
    'tiny_checkpoint/text_encoder': 'clip_projected',
    'tiny_checkpoint/text_encoder_2': 'clip_projected',
    'tiny_checkpoint/text_encoder_3': 't5',
    'tiny_checkpoint/context_adapter': 'adapter',
    'tiny_checkpoint/context_adapter_multistep_t2v': 'adapter',
    'tiny_checkpoint/ssd_1b_text_encoder': 'clip',
    'tiny_checkpoint/ssd_1b_text_encoder_2': 'clip_projected',
}


def weights_file(folder: pathlib.Path) -> pathlib.Path:
    (path,) = folder.glob('*.safetensors')
    return path


@functools.cache
def load(name: str) -> tuple[nn.Module, dict]:
    """Return module and variables of a stored component."""
    folder, kind = GOLDENS / name, STORED[name]
    config = CONFIGS[kind].from_json(json.loads((folder / 'config.json').read_text()), str(folder))
    module, entries, _ = build(kind, config)
    tensors = load_file(weights_file(folder))
    flat = {entry.path: jnp.asarray(entry.convert.to_flax(tensors[entry.torch_name])) for entry in entries}
    return module, {'params': traverse_util.unflatten_dict(flat)}


def apply(module: nn.Module, variables: dict, *inputs: Any, **options: Any) -> Any:
    """Return module.apply's result, computed under jit."""
    return jax.jit(functools.partial(module.apply, **options))(variables, *inputs)
