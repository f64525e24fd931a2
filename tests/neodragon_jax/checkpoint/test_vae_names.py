"""Tests of the rename table of the video VAE."""

from __future__ import annotations

import json
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.checkpoint.names.vae import video_vae_names
from neodragon_jax.config.neodragon import FULL, VideoVAEConfig
from neodragon_jax.models.vae import (
    VideoVAE,
)
from support.goldens import GOLDENS
from support.vae_folders import FOLDERS, read


def abstract_params(config: VideoVAEConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return the shape of every parameter by its path, without computing any; nothing else is initialized."""
    variables = jax.eval_shape(VideoVAE(config).init, jax.random.key(0), jnp.zeros((1, 9, 64, 64, 3)))
    assert set(variables) == {'params'}
    flat: dict[Any, Any] = flax.traverse_util.flatten_dict(variables['params'])
    return {path: x.shape for path, x in flat.items()}


@pytest.mark.parametrize('name', FOLDERS)
def test_names_of_a_checkpoint(name):
    config, tensors = read(name)
    entries = video_vae_names(config)
    assert len({entry.path for entry in entries}) == len(entries)
    assert sorted(entry.torch_name for entry in entries) == sorted(tensors)
    converted = {entry.path: entry.convert.to_flax(tensors[entry.torch_name]) for entry in entries}
    assert {path: x.shape for path, x in converted.items()} == abstract_params(config)
    for entry in entries:
        assert np.array_equal(entry.convert.to_torch(converted[entry.path]), tensors[entry.torch_name])


def test_names_at_full_size():
    wanted = json.loads((GOLDENS / 'manifest_full.json').read_text())['causal_video_vae']['keys']
    shapes = abstract_params(FULL.video_vae)
    entries = video_vae_names(FULL.video_vae)
    assert {entry.path for entry in entries} == set(shapes)
    for entry in entries:
        arrays = jax.eval_shape(entry.convert.to_torch, jax.ShapeDtypeStruct(shapes[entry.path], jnp.float32))
        assert list(arrays.shape) == wanted.pop(entry.torch_name), entry.torch_name
    assert not wanted
