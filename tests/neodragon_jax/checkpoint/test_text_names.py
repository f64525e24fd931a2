"""Tests of the rename tables of text encoders and context adapter."""

from __future__ import annotations

import json
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from neodragon_jax.checkpoint.names.convert import Entry
from neodragon_jax.checkpoint.names.text import (
    T5_TIED_NAMES,
    t5_encoder_names,
    t5_names,
)
from neodragon_jax.config.neodragon import FULL, T5Config
from neodragon_jax.models.t5 import T5Encoder
from support.goldens import GOLDENS
from support.text_components import CONFIGS, IDS, STORED, build, weights_file


def abstract_parameters(module: nn.Module, inputs: tuple) -> dict[tuple[str, ...], Any]:
    return traverse_util.flatten_dict(jax.eval_shape(module.init, jax.random.key(0), *inputs)['params'])


def assert_table_matches(module: nn.Module, entries: list[Entry], inputs: tuple, released: dict[str, tuple]) -> None:
    """Check the table against the module's parameters on one side and released names and shapes on the other."""
    ours = abstract_parameters(module, inputs)
    assert len(entries) == len(ours)
    assert {entry.path for entry in entries} == set(ours)
    shapes = {entry.torch_name: jax.eval_shape(entry.convert.to_torch, ours[entry.path]).shape for entry in entries}
    assert shapes == released


@pytest.mark.parametrize('name', STORED)
def test_rename_table_of_stored_weights(name):
    folder, kind = GOLDENS / name, STORED[name]
    config = CONFIGS[kind].from_json(json.loads((folder / 'config.json').read_text()), str(folder))
    tensors = load_file(weights_file(folder))
    module, entries, inputs = build(kind, config)
    assert_table_matches(module, entries, inputs, {key: value.shape for key, value in tensors.items()})
    for entry in entries:
        there_and_back = entry.convert.to_torch(entry.convert.to_flax(tensors[entry.torch_name]))
        np.testing.assert_array_equal(there_and_back, tensors[entry.torch_name])


@pytest.mark.parametrize(
    ('released', 'kind', 'config'),
    [
        ('context_adapter', 'adapter', FULL.context_adapter),
        ('text_encoder_3', 't5', FULL.t5),
        ('text_encoder', 'clip_projected', FULL.clip_l),
        ('text_encoder_2', 'clip_projected', FULL.clip_g),
        ('ssd_1b_text_encoder', 'clip', FULL.clip_l),
    ],
)
def test_rename_table_at_full_size(released, kind, config):
    keys = json.loads((GOLDENS / 'manifest_full.json').read_text())[released]['keys']
    shapes = {key: tuple(shape) for key, shape in keys.items()}
    if kind == 't5':
        ((alias, stored),) = ((alias, stored) for alias, stored in T5_TIED_NAMES.items() if stored in shapes)
        assert shapes.pop(alias) == shapes[stored]
    assert_table_matches(*build(kind, config), shapes)


def test_bare_t5_encoder_has_its_own_table():
    config = T5Config(out_dim=8, vocab_size=50, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=2)
    entries = t5_encoder_names(config)
    assert {entry.path for entry in entries} == set(abstract_parameters(T5Encoder(config), (IDS, IDS)))
    nested = {entry.torch_name.removeprefix('encoder.') for entry in t5_names(config)}
    assert {entry.torch_name for entry in entries} == {name for name in nested if 'projection' not in name}
