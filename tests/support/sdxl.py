"""The golden arrays of the first-frame modules."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file

from neodragon_jax.checkpoint.classes import COMPONENTS
from support.goldens import GOLDENS, load_golden

TOLERANCE = 2e-5


GOLDEN = 'ssd1b_tiny'


@functools.cache
def golden() -> dict[str, np.ndarray]:
    return load_golden(GOLDEN)


@functools.cache
def stored(name: str, kind: str) -> tuple[Any, Any]:
    """Load a component of the golden, whose files lie flat in one folder: module and parameters."""
    component, folder = COMPONENTS[kind], GOLDENS / GOLDEN
    config = component.config.from_json(json.loads((folder / f'{name}.config.json').read_text()), name)
    tensors = load_file(folder / f'{name}.safetensors')
    flat = {entry.path: entry.convert.to_flax(tensors.pop(entry.torch_name)) for entry in component.entries(config)}
    assert not tensors
    return component.build(config), traverse_util.unflatten_dict(flat)
