"""Tests of loading and saving the released layout: exact round trips, full-size names, and clear errors."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.abstract import example_inputs, tensor_shapes
from neodragon_jax.checkpoint.classes import COMPONENTS as COMPONENT_CLASSES
from neodragon_jax.checkpoint.names.text import T5_TIED_NAMES
from neodragon_jax.checkpoint.random_params import PRESETS
from neodragon_jax.checkpoint.weights import ZERO_AT_START
from neodragon_jax.config.neodragon import FULL, TINY
from neodragon_jax.models.mmdit import stack_blocks
from support.goldens import GOLDENS, TINY_CHECKPOINT

COMPONENTS = [
    'diffusion_transformer_320p',
    'diffusion_transformer_320p_multistep_t2v',
    'context_adapter',
    'context_adapter_multistep_t2v',
    'causal_video_vae',
    'text_encoder',
    'text_encoder_2',
    'text_encoder_3',
    'ssd_1b_text_encoder',
    'ssd_1b_text_encoder_2',
]


def weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(next(folder.glob('*.safetensors')))


@pytest.mark.parametrize('name', COMPONENTS)
def test_save_returns_what_was_loaded(name, tmp_path):
    source = TINY_CHECKPOINT / name
    module, params = checkpoint.load(source)
    checkpoint.save(tmp_path / 'a', module, params)
    before, after = weights(source), weights(tmp_path / 'a')
    assert list(sorted(before)) == list(sorted(after))
    for key, value in before.items():
        assert value.dtype == after[key].dtype and value.tobytes() == after[key].tobytes(), key
    again, _ = checkpoint.load(tmp_path / 'a')
    assert again == module
    saved, given = (json.loads((folder / 'config.json').read_text()) for folder in (tmp_path / 'a', source))
    assert {key: given[key] for key in saved if key in given} == {key: saved[key] for key in saved if key in given}
    assert not list((tmp_path / 'a').glob('.*')), 'temporary files are left'


def test_save_from_the_scanned_form(tmp_path):
    source = TINY_CHECKPOINT / 'diffusion_transformer_320p'
    module, params = checkpoint.load(source)
    stacked = stack_blocks(params, module.config.num_layers)
    checkpoint.save(tmp_path, module.clone(scan=True), stacked)
    for key, value in weights(source).items():
        np.testing.assert_array_equal(value, weights(tmp_path)[key])


def test_bfloat16_weights_stay_bfloat16(tmp_path):
    module, params = checkpoint.load(TINY_CHECKPOINT / 'context_adapter')
    small = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16)), params)
    checkpoint.save(tmp_path / 'a', module, small)
    _, loaded = checkpoint.load(tmp_path / 'a')
    assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), small, loaded))


def test_sharded_weight_files(tmp_path):
    source = TINY_CHECKPOINT / 'context_adapter'
    shutil.copytree(source, tmp_path / 'a')
    (file,) = (tmp_path / 'a').glob('*.safetensors')
    tensors = weights(source)
    names = sorted(tensors)
    parts = {'part-1.safetensors': names[:2], 'part-2.safetensors': names[2:]}
    for part, keys in parts.items():
        safetensors.numpy.save_file({key: tensors[key] for key in keys}, tmp_path / 'a' / part)
    index = {'weight_map': {key: part for part, keys in parts.items() for key in keys}}
    file.with_name(file.name + '.index.json').write_text(json.dumps(index))
    file.unlink()
    _, params = checkpoint.load(tmp_path / 'a')
    assert jax.tree.all(jax.tree.map(np.array_equal, params, checkpoint.load(source)[1]))
    (tmp_path / 'a' / 'part-2.safetensors').unlink()
    with pytest.raises(InputError, match='part-2'):
        checkpoint.load(tmp_path / 'a')


def full_components() -> list[tuple[str, str, object]]:
    return [
        ('diffusion_transformer_320p', 'PyramidMMDiT', FULL.denoiser),
        ('teacher_24_layers_reference_class', 'PyramidMMDiT', dataclasses.replace(FULL.denoiser, num_layers=24)),
        ('context_adapter', 'ContextAdapter', FULL.context_adapter),
        ('text_encoder_3', 'T5EncoderWithProjection', FULL.t5),
        ('causal_video_vae', 'AsymmetricCausalVideoVAE', FULL.video_vae),
        ('text_encoder', 'CLIPTextModelWithProjection', FULL.clip_l),
        ('text_encoder_2', 'CLIPTextModelWithProjection', FULL.clip_g),
        ('ssd_1b_text_encoder', 'CLIPTextModel', FULL.clip_l),
    ]


@pytest.mark.parametrize(('name', 'kind', 'config'), full_components())
def test_full_size_names_and_shapes(name, kind, config):
    want = json.loads((GOLDENS / 'manifest_full.json').read_text())[name]
    got = {key: list(leaf.shape) for key, leaf in tensor_shapes(kind, config).items()}
    shapes = {key: shape for key, shape in want['keys'].items() if key not in T5_TIED_NAMES}
    assert got == shapes
    count = sum(int(np.prod(shape)) for shape in got.values()) - want['buffer_elems_in_state_dict']
    assert count == want['params_total']
    print(f'{name}: {count / 1e9:.3f}B parameters')


def test_tiny_preset_is_the_miniature():
    modules = {
        'diffusion_transformer_320p': TINY.denoiser,
        'context_adapter': TINY.context_adapter,
        'causal_video_vae': TINY.video_vae,
        'text_encoder_3': TINY.t5,
        'text_encoder': TINY.clip_l,
        'text_encoder_2': TINY.clip_g,
    }
    for name, config in modules.items():
        assert checkpoint.load(TINY_CHECKPOINT / name)[0].config == config, name


@pytest.mark.parametrize('name', ['diffusion_transformer_320p', 'context_adapter', 'quicksrnet'])
def test_untrained_components_can_be_loaded(tmp_path, name):
    """Matrices that are zero at the start of a training are not taken for damage."""
    part = PRESETS['tiny'][name]
    module = COMPONENT_CLASSES[part.kind].build(part.config)
    params = jax.jit(module.init)(jax.random.key(0), *example_inputs(module))['params']
    checkpoint.save(tmp_path, module, jax.tree.map(np.asarray, params))
    checkpoint.load(tmp_path)
    zero = [key for key, value in weights(tmp_path).items() if value.ndim > 1 and not value.any()]
    assert all(ZERO_AT_START.fullmatch(key) for key in zero) and bool(zero) == name.startswith('diffusion')


@pytest.fixture
def adapter(tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(TINY_CHECKPOINT / 'context_adapter', tmp_path / 'adapter'))


def edit_config(folder: pathlib.Path, **changes) -> None:
    path = folder / 'config.json'
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize(
    ('break_it', 'message'),
    [
        (lambda a: shutil.rmtree(a), 'no such folder'),
        (lambda a: (a / 'config.json').unlink(), 'no config.json'),
        (lambda a: (a / 'config.json').write_text('{'), 'not valid JSON'),
        (lambda a: edit_config(a, _class_name='Other'), "class 'Other' is not supported"),
        (lambda a: edit_config(a, input_dim=3), 'unknown key "input_dim"'),
        (lambda a: edit_config(a, activation_fn='mish'), "activation_fn is 'mish'"),
        (lambda a: edit_config(a, input_dims=41), r'network_layers\.0\.1\.weight has shape \[48, 40\]'),
        (lambda a: edit_config(a, use_biases=False), 'is not expected'),
        (lambda a: edit_config(a, layer_depths=[48] * 3, skips=[True] * 3), 'is missing'),
        (lambda a: next(a.glob('*.safetensors')).unlink(), 'no weights'),
        (lambda a: next(a.glob('*.safetensors')).write_bytes(b''), 'truncated'),
        (lambda a: (lambda f: f.write_bytes(f.read_bytes()[:-100]))(next(a.glob('*.safetensors'))), 'truncated'),
    ],
)
def test_damage_is_named_in_one_line(adapter, break_it, message):
    break_it(adapter)
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load(adapter)
    assert '\n' not in str(caught.value) and 'adapter' in str(caught.value)


def test_misspelt_key_of_a_text_encoder(tmp_path):
    folder = pathlib.Path(shutil.copytree(TINY_CHECKPOINT / 'text_encoder_3', tmp_path / 't5'))
    edit_config(folder, out_dims=40)
    edit_config(folder, out_dim=None)
    with pytest.raises(InputError, match='Did you mean "out_dim"'):
        checkpoint.load(folder)


def test_a_whole_checkpoint_is_not_a_component():
    with pytest.raises(InputError, match='causal_video_vae'):
        checkpoint.load(TINY_CHECKPOINT)
    with pytest.raises(InputError, match='no component "text_encoder_9"'):
        checkpoint.component_folder(TINY_CHECKPOINT, 'text_encoder_9')


def test_saving_parameters_of_another_module(tmp_path):
    module, _ = checkpoint.load(TINY_CHECKPOINT / 'context_adapter')
    _, params = checkpoint.load(TINY_CHECKPOINT / 'text_encoder')
    with pytest.raises(InputError, match='has no such parameter'):
        checkpoint.save(tmp_path / 'a', module, params)
    assert not (tmp_path / 'a').exists()
