"""The golden denoisers and their inputs."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from neodragon_jax.checkpoint.names.mmdit import mmdit_names
from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.models.mmdit import PyramidMMDiT
from support.goldens import GOLDENS, channels_last


@functools.cache
def model_and_params(name: str) -> tuple[PyramidMMDiT, dict[str, Any]]:
    config = MMDiTConfig.from_json(json.loads((GOLDENS / name / 'config.json').read_text()), name)
    tensors = safetensors.numpy.load_file(GOLDENS / name / 'model.safetensors')
    entries = mmdit_names(config)
    assert {entry.torch_name for entry in entries} == set(tensors)
    params = {entry.path: jnp.asarray(entry.convert.to_flax(tensors[entry.torch_name])) for entry in entries}
    return PyramidMMDiT(config), traverse_util.unflatten_dict(params)


def inputs(golden: dict[str, np.ndarray], case: str, clips: str = 'clip') -> list[Any]:
    found: list[Any] = []
    while f'{case}/in/{clips}{len(found)}' in golden:
        found.append(jnp.asarray(channels_last(golden[f'{case}/in/{clips}{len(found)}'])))
    rest = [jnp.asarray(golden[f'{case}/in/{key}']) for key in ('text', 'text_mask', 'pooled', 'timestep')]
    return [found, *rest]
