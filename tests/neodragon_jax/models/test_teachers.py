"""Tests of the teacher's denoiser and text encoder in their released layouts: names, round trips, shared parts."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.abstract import tensor_shapes
from neodragon_jax.checkpoint.classes import COMPONENTS
from neodragon_jax.config.neodragon import FULL, T5Config, T5EncoderConfig
from neodragon_jax.config.pyramid_flow import T5_XXL, TEACHER, TeacherMMDiTConfig
from neodragon_jax.models.mmdit import PyramidMMDiT, stack_blocks
from neodragon_jax.models.t5 import T5Encoder, T5EncoderWithProjection
from neodragon_jax.models.teacher import TeacherMMDiT
from support.goldens import GOLDENS, relative_error

TINY_TEACHER = TeacherMMDiTConfig(
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=4,
    sample_size=8,
    pos_embed_max_size=8,
    joint_attention_dim=24,
    caption_projection_dim=16,
    pooled_projection_dim=12,
)
SMALL_T5 = T5EncoderConfig(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3)


def random_tensors(kind: str, config: Any) -> dict[str, np.ndarray]:
    """Return random weights under the released names and in the released shapes."""
    draw = np.random.default_rng(0).standard_normal
    shapes = tensor_shapes(kind, config)
    return {key: (0.3 * draw(leaf.shape)).astype(np.float32) for key, leaf in sorted(shapes.items())}


# --- denoiser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def teacher_folder(tmp_path_factory) -> pathlib.Path:
    """A tiny teacher as Pyramid-Flow writes it."""
    folder = tmp_path_factory.mktemp('teacher')
    tensors = random_tensors('PyramidDiffusionMMDiT', TINY_TEACHER)
    safetensors.numpy.save_file(tensors, folder / 'diffusion_pytorch_model.safetensors')
    config = {'_class_name': 'PyramidDiffusionMMDiT', '_diffusers_version': '0.30.1', **TINY_TEACHER.to_json()}
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ('name', 'layers', 'billions'),
    [('teacher_24_layers_pyramid_flow_class', 24, 2.028), ('student_18_layers_pyramid_flow_class', 18, 1.518)],
)
def test_teacher_names_at_full_size(name, layers, billions):
    want = json.loads((GOLDENS / 'manifest_full.json').read_text())[name]
    config = TEACHER if layers == 24 else TeacherMMDiTConfig(num_layers=layers)
    shapes = {key: list(leaf.shape) for key, leaf in tensor_shapes('PyramidDiffusionMMDiT', config).items()}
    assert shapes == want['keys']
    count = sum(int(np.prod(shape)) for shape in shapes.values()) - want['buffer_elems_in_state_dict']
    assert count == want['params_total'] and round(count / 1e9, 3) == billions


@pytest.mark.parametrize('scan', [False, True])
def test_teacher_round_trip(teacher_folder, tmp_path, scan):
    module, params = checkpoint.load(teacher_folder)
    assert module == TeacherMMDiT(TINY_TEACHER)
    if scan:
        module = TeacherMMDiT(TINY_TEACHER, scan=True)
        params = {**params, 'denoiser': stack_blocks(params['denoiser'], TINY_TEACHER.num_layers)}
    checkpoint.save(tmp_path, module, params)
    before, after = (
        safetensors.numpy.load_file(folder / 'diffusion_pytorch_model.safetensors')
        for folder in (teacher_folder, tmp_path)
    )
    assert sorted(before) == sorted(after)
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    given, written = (json.loads((folder / 'config.json').read_text()) for folder in (teacher_folder, tmp_path))
    assert {key: value for key, value in given.items() if key != '_diffusers_version'} == written


def test_teacher_is_the_denoiser_on_embedded_text(teacher_folder):
    module, params = checkpoint.load(teacher_folder)
    tensors = safetensors.numpy.load_file(teacher_folder / 'diffusion_pytorch_model.safetensors')
    draw = functools.partial(np.random.default_rng(1).standard_normal, dtype=np.float32)
    clips, states = [draw((2, 1, 2, 4, 4)), draw((2, 1, 4, 8, 4))], draw((2, 5, 24))
    rest = (np.array([[1] * 5, [1, 1, 1, 0, 0]]), draw((2, 12)), np.array([500.0, 20.0], np.float32))
    text = states @ tensors['context_embedder.weight'].T + tensors['context_embedder.bias']
    embed = jax.jit(functools.partial(module.apply, method='embed_text'))
    embedded = embed({'params': params}, states)
    assert relative_error(embedded, text) < 1e-6
    got = jax.jit(module.apply)({'params': params}, clips, states, *rest)
    want = jax.jit(PyramidMMDiT(TINY_TEACHER).apply)({'params': params['denoiser']}, clips, text, *rest)
    assert relative_error(got, want) < 2e-5
    assert np.std(want) > 0.1
    # The embedder runs alone: distilling a text encoder needs no other part of the teacher.
    alone = {'params': {'context_embedder': params['context_embedder']}}
    assert np.array_equal(embed(alone, states), embedded)


def test_other_teachers_are_refused():
    with pytest.raises(InputError, match='use_flash_attn is True'):
        TeacherMMDiTConfig(use_flash_attn=True)
    with pytest.raises(InputError, match='caption_projection_dim is 1152; supported: 1536'):
        TeacherMMDiTConfig(caption_projection_dim=1152)


# --- text encoder ------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def t5_folder(tmp_path_factory) -> pathlib.Path:
    """A small T5 encoder as transformers writes it: two shards, an index, and a config with its many other keys."""
    folder = tmp_path_factory.mktemp('t5')
    tensors = random_tensors('T5EncoderModel', SMALL_T5)
    names = sorted(tensors)
    shards = {'model-00001-of-00002.safetensors': names[::2], 'model-00002-of-00002.safetensors': names[1::2]}
    for shard, keys in shards.items():
        safetensors.numpy.save_file({key: tensors[key] for key in keys}, folder / shard, metadata={'format': 'pt'})
    index = {
        'metadata': {'total_size': sum(x.nbytes for x in tensors.values())},
        'weight_map': {key: shard for shard, keys in shards.items() for key in keys},
    }
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    others = {'decoder_start_token_id': 0, 'num_decoder_layers': 24, 'initializer_factor': 1.0, 'output_past': True}
    others |= {'is_encoder_decoder': True, 'tie_word_embeddings': False, 'use_cache': True, 'torch_dtype': 'float16'}
    config = {**SMALL_T5.to_json(), **others, 'architectures': ['T5EncoderModel']}
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def test_t5_xxl_names_at_full_size():
    shapes = {key: leaf.shape for key, leaf in tensor_shapes('T5EncoderModel', T5_XXL).items()}
    assert len(shapes) == 2 + 24 * 9 + 1
    assert shapes['shared.weight'] == (32128, 4096)
    bias = 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
    assert shapes[bias] == (32, 64) and sum('relative_attention_bias' in key for key in shapes) == 1
    assert shapes['encoder.block.23.layer.1.DenseReluDense.wo.weight'] == (4096, 10240)
    assert shapes['encoder.final_layer_norm.weight'] == (4096,)
    assert round(sum(int(np.prod(shape)) for shape in shapes.values()) / 1e9, 3) == 4.762
    # DT5's projection ends at this width, which is the teacher's input width.
    assert T5_XXL.d_model == FULL.t5.out_dim == TEACHER.joint_attention_dim


def test_t5_encoder_from_shards_is_the_encoder_of_dt5(t5_folder):
    module, params = checkpoint.load(t5_folder)
    assert module == T5Encoder(SMALL_T5)
    tensors = random_tensors('T5EncoderModel', SMALL_T5)
    projected = T5Config(out_dim=8, **SMALL_T5.__dict__)
    names = COMPONENTS['T5EncoderWithProjection'].entries(projected)
    shared = [entry for entry in names if entry.path[0] == 'encoder']
    flat = {entry.path: entry.convert.to_flax(tensors[entry.torch_name.removeprefix('encoder.')]) for entry in shared}
    dt5 = traverse_util.unflatten_dict(flat)
    ids, mask = np.random.default_rng(2).integers(0, 64, (2, 7)), np.array([[1] * 7, [1] * 4 + [0] * 3])
    got = jax.jit(module.apply)({'params': params}, ids, mask)
    encode = functools.partial(T5EncoderWithProjection(projected).apply, method='encode')
    assert got.shape == (2, 7, 16) and np.array_equal(got, jax.jit(encode)({'params': dt5}, ids, mask))


def test_t5_encoder_round_trip(t5_folder, tmp_path):
    module, params = checkpoint.load(t5_folder)
    checkpoint.save(tmp_path, module, params)
    saved, given = (
        safetensors.numpy.load_file(tmp_path / 'model.safetensors'),
        random_tensors('T5EncoderModel', SMALL_T5),
    )
    assert sorted(saved) == sorted(given) and all(np.array_equal(saved[key], given[key]) for key in given)
    assert checkpoint.load(tmp_path)[0] == module
    assert 'out_dim' not in json.loads((tmp_path / 'config.json').read_text())


def test_t5_encoder_with_the_embedding_under_its_second_name(t5_folder, tmp_path):
    """A file that stores the tied embedding under either name, or both, is the same encoder."""
    want = checkpoint.load(t5_folder)[1]
    tensors = random_tensors('T5EncoderModel', SMALL_T5)
    both = tensors | {'encoder.embed_tokens.weight': tensors['shared.weight']}
    second = {key: value for key, value in both.items() if key != 'shared.weight'}
    for name, stored in {'both': both, 'second': second}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / 'config.json').write_text((t5_folder / 'config.json').read_text())
        safetensors.numpy.save_file(stored, tmp_path / name / 'model.safetensors')
        assert jax.tree.all(jax.tree.map(np.array_equal, want, checkpoint.load(tmp_path / name)[1]))
