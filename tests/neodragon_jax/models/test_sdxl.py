"""Tests of the first-frame UNet and image VAE: the reference's arrays, the released names, and bad input."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.abstract import tensor_shapes
from neodragon_jax.config.sdxl import (
    FULL_IMAGE_VAE,
    FULL_UNET,
    TINY_IMAGE_VAE,
    TINY_UNET,
    ImageVAEConfig,
    Level,
    UNetConfig,
)
from support.goldens import GOLDENS, TINY_CHECKPOINT, channels_last, relative_error
from support.sdxl import TOLERANCE, golden, stored


def inputs(timestep: int) -> list[jax.Array]:
    """Return the golden's inputs of the UNet."""
    x, text, pooled, sizes = (golden()[f'unet/{name}'] for name in ('sample', 'prompt_embeds', 'pooled', 'time_ids'))
    return [jnp.asarray(a) for a in (channels_last(x), np.full(2, timestep, np.float32), text, pooled, sizes)]


@functools.cache
def capturing(dtype: Any = None) -> tuple[Any, Any]:
    """Return a function that gives the UNet's output and every module's output, and its first argument."""
    module, params = stored('unet', 'UNet2DConditionModel')
    module = module.clone(dtype=dtype)
    apply = functools.partial(module.apply, capture_intermediates=True, mutable=['intermediates'])
    return jax.jit(apply), {'params': params}


@functools.cache
def run_unet(timestep: int) -> tuple[jax.Array, Any]:
    apply, variables = capturing()
    out, captured = apply(variables, *inputs(timestep))
    return out, captured['intermediates']


# --- UNet --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('timestep', [999, 249])
def test_unet(timestep):
    out, _ = run_unet(timestep)
    error = relative_error(out, channels_last(golden()[f'unet/out_t{timestep}']))
    print(f'unet at {timestep}: {error:.1e}')
    assert error < TOLERANCE


@pytest.mark.parametrize(
    ('theirs', 'ours'),
    [(name, name) for name in ('time_embedding', 'add_embedding', 'mid')]
    + [(f'down{index}', f'down_{index}') for index in range(3)]
    + [(f'up{index}', f'up_{index}') for index in (0, 2)],
)
def test_inside_the_unet(theirs, ours):
    _, captured = run_unet(999)
    (got,) = captured[ours]['__call__']
    got = got[0] if isinstance(got, tuple) else got  # A level on the way down also returns its skips.
    want = golden()[f'unet/inter_t999_{theirs}']
    error = relative_error(got, channels_last(want) if want.ndim == 4 else want)
    print(f'{theirs}: {error:.1e}')
    assert error < TOLERANCE


def test_embed_gives_the_activated_sum():
    module, params = stored('unet', 'UNet2DConditionModel')
    _, timestep, _, pooled, sizes = inputs(999)
    embed = jax.jit(functools.partial(module.apply, method='embed'))
    got = embed({'params': params}, timestep, pooled, sizes)
    want = golden()['unet/inter_t999_time_embedding'] + golden()['unet/inter_t999_add_embedding']
    assert relative_error(got, want / (1 + np.exp(-want))) < TOLERANCE


def test_a_compute_type_reaches_every_block():
    apply, variables = capturing(jnp.bfloat16)
    out, captured = jax.eval_shape(apply, variables, *inputs(999))
    assert out.dtype == jnp.bfloat16
    for name, values in captured['intermediates'].items():
        wide = name in ('time_embedding', 'add_embedding', 'embed')
        types = {leaf.dtype for leaf in jax.tree.leaves(values) if leaf.ndim == 4 or wide}
        assert types == {jnp.dtype(jnp.float32 if wide else jnp.bfloat16)}, name


def test_unet_grid_that_cannot_be_halved():
    module, _ = stored('unet', 'UNet2DConditionModel')
    shapes = (1, 6, 8, 4), (1,), (1, 2, 56), (1, 28), (1, 6)
    with pytest.raises(InputError, match='6x8; give a grid of multiples of 4'):
        jax.eval_shape(module.init, jax.random.key(0), *(jnp.zeros(shape) for shape in shapes))


# --- image VAE ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('method', 'source', 'target'), [('encode', 'enc_in', 'enc_moments'), ('decode', 'z', 'decoded')]
)
def test_image_vae(method, source, target):
    module, params = stored('vae', 'AutoencoderKL')
    got = jax.jit(functools.partial(module.apply, method=method))(
        {'params': params}, channels_last(golden()[f'vae/{source}'])
    )
    error = relative_error(got, channels_last(golden()[f'vae/{target}']))
    print(f'{method}: {error:.1e}')
    assert error < TOLERANCE


def test_pictures_that_do_not_divide():
    module, _ = stored('vae', 'AutoencoderKL')
    with pytest.raises(InputError, match='multiples of 8'):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 20, 16, 3)))


# --- released layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('name', 'tiny'), [('ssd_1b_unet', TINY_UNET), ('ssd_1b_vae', TINY_IMAGE_VAE)])
def test_save_returns_what_was_loaded(name, tiny, tmp_path):
    source = TINY_CHECKPOINT / name
    module, params = checkpoint.load(source)
    assert module.config == tiny
    checkpoint.save(tmp_path, module, params)
    file = 'diffusion_pytorch_model.safetensors'
    before, after = load_file(source / file), load_file(tmp_path / file)
    assert set(before) == set(after)
    for key, value in before.items():
        assert value.dtype == after[key].dtype and value.tobytes() == after[key].tobytes(), key
    given, saved = (json.loads((folder / 'config.json').read_text()) for folder in (source, tmp_path))
    assert saved == {key: value for key, value in given.items() if key != '_diffusers_version'}
    again, params_again = checkpoint.load(tmp_path)
    assert again == module and hash(again) == hash(module)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, params_again))


@pytest.mark.parametrize(
    ('name', 'kind', 'config'),
    [('ssd_1b_unet', 'UNet2DConditionModel', FULL_UNET), ('ssd_1b_vae', 'AutoencoderKL', FULL_IMAGE_VAE)],
)
def test_full_size_names_and_shapes(name, kind, config):
    want = json.loads((GOLDENS / 'manifest_full.json').read_text())[name]
    got = {key: list(leaf.shape) for key, leaf in tensor_shapes(kind, config).items()}
    assert got == want['keys']
    count = sum(int(np.prod(shape)) for shape in got.values())
    assert count == want['params_total']
    print(f'{name}: {count / 1e9:.3f}B parameters')


def test_full_preset_is_the_recorded_config():
    text = json.loads((GOLDENS / 'manifest_full.json').read_text())['ssd_1b_unet']['assumptions']
    values = json.loads(text[text.index('{') : text.rindex('}') + 1])
    assert UNetConfig.from_json(values, 'manifest') == FULL_UNET
    assert {key: FULL_UNET.to_json()[key] for key in values} == values


# --- configs -----------------------------------------------------------------------------------------------------


def test_levels_of_the_full_unet():
    assert FULL_UNET.down_levels[1] == Level(640, (320, 640), (2, 2), 10, True)
    assert FULL_UNET.up_levels[0] == Level(1280, (2560, 2560, 1920), (4, 4, 10), 20, True)
    assert FULL_UNET.up_levels[2] == Level(320, (960, 640, 640), (0, 0, 0), 5, False)


def test_one_number_for_all_levels_and_no_separate_way_up():
    """Alternative forms in released configs: the up levels of plain SDXL mirror its down levels."""
    config = dataclasses.replace(
        FULL_UNET,
        layers_per_block=(2, 2, 2),
        transformer_layers_per_block=((1, 1), (2, 2), 10),
        reverse_transformer_layers_per_block=(10, (2, 2, 2), 1),
    )
    mirrored = dataclasses.replace(
        config, transformer_layers_per_block=(1, 2, 10), reverse_transformer_layers_per_block=None
    )
    assert config.down_levels == mirrored.down_levels
    assert config.up_levels == mirrored.up_levels
    assert [level.depths for level in mirrored.up_levels] == [(10,) * 3, (2,) * 3, (0,) * 3]


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        ({'mid_block_type': 'UNetMidBlock2DCrossAttn'}, 'mid_block_type'),
        ({'time_cond_proj_dim': 256}, 'time_cond_proj_dim'),
        ({'addition_embed_type': None}, 'addition_embed_type'),
        ({'use_linear_projection': False}, 'use_linear_projection'),
        ({'encoder_hid_dim': 7}, 'encoder_hid_dim'),
        ({'cross_attention_dim': [2048, 2048, 2048]}, 'cross_attention_dim'),
        ({'attention_head_dim': [1, 2]}, 'attention_head_dim has 2 values for 3 levels'),
        ({'attention_head_dim': [1, 3, 2]}, 'attention_head_dim 3 does not divide 16'),
        ({'norm_num_groups': 3}, 'norm_num_groups 3 does not divide 8'),
        ({'down_block_types': ['DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D']}, 'AttnDownBlock2D'),
        ({'reverse_transformer_layers_per_block': [[1, 1], [2, 1, 1], 1]}, r'depths \[1, 1\]; give 3'),
        ({'reverse_transformer_layers_per_block': None, 'transformer_layers_per_block': [1, [1, 2], 1]}, 'give it'),
        ({'projection_class_embeddings_input_dim': 96}, 'must exceed the 96'),
        ({'block_out_chanels': [8]}, 'unknown key "block_out_chanels"'),
    ],
)
def test_unet_configs_that_are_refused(changes, named):
    with pytest.raises(InputError, match=named) as caught:
        UNetConfig.from_json(TINY_UNET.to_json() | changes, 'folder/config.json')
    assert str(caught.value).startswith('folder/config.json') and '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        ({'shift_factor': 0.1}, 'shift_factor'),
        ({'latents_mean': [0.0] * 4}, 'latents_mean'),
        ({'use_quant_conv': False}, 'use_quant_conv'),
        ({'up_block_types': ['UpDecoderBlock2D'] * 3}, 'up_block_types'),
        ({'norm_num_groups': 3}, 'norm_num_groups'),
    ],
)
def test_image_vae_configs_that_are_refused(changes, named):
    with pytest.raises(InputError, match=named):
        ImageVAEConfig.from_json(TINY_IMAGE_VAE.to_json() | changes, 'folder/config.json')
