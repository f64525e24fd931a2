"""Asymmetric decoder distillation: the encoder is unchanged bit for bit, and the small decoder learns."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from configs import decoder as presets
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.abstract import example_inputs
from neodragon_jax.checkpoint.weights import WEIGHT_FILES
from neodragon_jax.config.neodragon import FULL, VideoVAEConfig
from neodragon_jax.config.pyramid_flow import PyramidFlowVAEConfig
from neodragon_jax.models.native_decoder import NativeVAE
from neodragon_jax.models.vae import VideoVAE, normalize
from support.glossary import unexplained
from support.goldens import TINY_CHECKPOINT
from support.training_runs import copy_killed, digests
from train.decoder import networks
from train.decoder import program as decoder
from train.runtime.metrics import read_metrics
from train.runtime.settings import freeze
from train.runtime.sharding import AXES
from train.vae.clips import ClipsConfig, blank_clips
from train.vae.fresh_parameters import fresh_small_decoder

WEIGHTS = WEIGHT_FILES[0]
FEATURES = (16, 12, 8, 8)
STEPS = 40


def native_sizes() -> PyramidFlowVAEConfig:
    """Three levels instead of four, with one block each."""
    halves, values = ('encoder', 'decoder'), {}
    for half in halves:
        values |= {f'{half}_block_out_channels': (4, 4, 8), f'{half}_layers_per_block': (1, 1, 1)}
        values |= {f'{half}_block_dropout': (0.0,) * 3, f'{half}_norm_num_groups': 2}
    for half, way, block in zip(halves, ('down', 'up'), ('DownEncoder', 'UpDecoder'), strict=True):
        values |= {f'{half}_{axes}_{way}_sample': (True,) * 3 for axes in ('spatial', 'temporal')}
        values[f'{half}_{way}_block_types'] = (f'{block}BlockCausal3D',) * 3
    return PyramidFlowVAEConfig(**values)


@pytest.fixture(scope='module')
def native(tmp_path_factory):
    """A random autoencoder, stored in bfloat16 as the public ones may be."""
    folder = tmp_path_factory.mktemp('native')
    module = NativeVAE(native_sizes())
    params = jax.jit(module.init)(jax.random.key(3), *example_inputs(module))['params']
    checkpoint.save(folder, module, jax.tree.map(lambda leaf: np.asarray(leaf, ml_dtypes.bfloat16), params))
    return folder


def settings(native, workdir, steps: int = STEPS):
    config = presets.get_config('tiny')
    config.update({'workdir': str(workdir), 'clips': {'frames': 9, 'height': 16, 'width': 16, 'held_out': 2}})
    config.decoder.update({'start': str(native), 'features': FEATURES, 'evaluation': {'batch': 2, 'videos': 1}})
    config.decoder.optimizer.update({'learning_rate': 5e-3, 'warmup_steps': 5})
    config.loop.update({'steps': steps, 'log_every': 1, 'checkpoint_every': STEPS // 2, 'evaluate_every': STEPS // 2})
    config.loop.mesh = dict(zip(AXES, (2, 1, 1), strict=True))
    return config


@pytest.fixture(scope='module')
def unbroken(native, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('unbroken')
    config = settings(native, workdir)
    config.decoder.native_weight = 0.1
    decoder.RECIPE.run(config)
    return workdir


def tensors(folder) -> dict[str, Any]:
    return safetensors.numpy.load_file(folder / WEIGHTS)


@pytest.mark.long
def test_it_learns(unbroken):
    rows = read_metrics(unbroken)
    first, last = (np.mean([row['loss'] for row in part]) for part in (rows[:3], rows[-3:]))
    evaluated = [row for row in rows if 'eval/psnr' in row]
    print(f'loss {first:.3f} -> {last:.3f}, held-out PSNR {[row["eval/psnr"] for row in evaluated]}')
    # The mean color, the easy part, is right before the first step.
    assert last < 0.95 * first
    assert evaluated[-1]['eval/psnr'] > evaluated[0]['eval/psnr'] + 0.2
    assert not unexplained({name for row in rows for name in row})
    # The native decoder is random, and does not change.
    assert evaluated[-1]['eval/native_psnr'] == pytest.approx(evaluated[0]['eval/native_psnr'], abs=1e-3)
    assert evaluated[-1]['eval/psnr'] > evaluated[-1]['eval/native_psnr']
    assert {'eval/ssim', 'eval/psnr_worst', 'eval/psnr_to_native', 'eval/ssim_to_native'} <= evaluated[-1].keys()
    sample = unbroken / 'samples' / f'step_{STEPS:06d}'
    assert sorted(path.name for path in sample.iterdir()) == ['000.mp4', '000.png', 'clips.json']


@pytest.mark.long
def test_the_encoder_is_byte_for_byte_as_it_was(native, unbroken):
    """So are the latents, and only the decoder's tensors are new."""
    folder = unbroken / 'result' / folders.VIDEO_VAE
    before, after = tensors(native), tensors(folder)
    kept = {name for name in after if name.startswith(('encoder.', 'quant_conv.'))}
    assert kept == {name for name in before if name.startswith(('encoder.', 'quant_conv.'))}
    for name in kept:
        assert (after[name].dtype, after[name].tobytes()) == (before[name].dtype, before[name].tobytes()), name
    assert {after[name].dtype for name in after.keys() - kept} == {np.dtype(np.float32)}

    (old, old_params), (new, new_params) = checkpoint.load(native), checkpoint.load(folder)
    assert isinstance(old, NativeVAE) and isinstance(new, VideoVAE)
    assert new.config.decoder_num_features == FEATURES
    video = jax.random.uniform(jax.random.key(0), (1, 9, 16, 16, 3), minval=-1)
    one, other = (
        jax.jit(lambda x, module=module, params=params: module.apply({'params': params}, x, method='encode'))(video)
        for module, params in ((old, old_params), (new, new_params))
    )
    assert np.array_equal(one, other)


@pytest.mark.long
def test_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(native, unbroken, tmp_path):
    config = settings(native, copy_killed(unbroken, STEPS // 2, tmp_path))
    config.decoder.native_weight = 0.1
    decoder.RECIPE.run(config)
    assert len(digests(unbroken / 'result')) == 3
    assert digests(tmp_path / 'result') == digests(unbroken / 'result')


@pytest.mark.long
def test_another_encoder_does_not_continue_a_run(native, unbroken, tmp_path):
    module, params = checkpoint.load(native)
    params['encoder']['conv_in']['bias'] = params['encoder']['conv_in']['bias'] + 1
    checkpoint.save(tmp_path, module, params)
    config = settings(tmp_path, unbroken, STEPS + 1)
    config.decoder.native_weight = 0.1
    with pytest.raises(InputError, match='encoder'):
        decoder.RECIPE.run(config)


@pytest.mark.slow  # the loop's own tests do this with a small program; here it is half a minute of compiling
@pytest.mark.parametrize(('mesh', 'parts'), [((1, 1, 1), 1), ((8, 1, 1), 1), ((2, 2, 1), 2)])
def test_meshes_and_parts_of_batches_agree(native, unbroken, tmp_path, mesh, parts):
    """The uninterrupted run is on two devices, each batch at once."""
    config = settings(native, tmp_path, 3)
    config.decoder.update({'native_weight': 0.1, 'accumulate': parts})
    config.loop.mesh = dict(zip(AXES, mesh, strict=True))
    config.loop.evaluate_every = 0
    decoder.RECIPE.run(config)
    for got, want in zip(read_metrics(tmp_path), read_metrics(unbroken), strict=False):
        for name in ('loss', 'grad_norm', 'native'):
            assert got[name] == pytest.approx(want[name], rel=2e-4), (got['step'], name)


@pytest.mark.long
def test_it_goes_on_from_a_small_decoder(native, unbroken):
    """With the widths and parameters of the decoder in the folder, and a native decoder from elsewhere."""
    folder = unbroken / 'result' / folders.VIDEO_VAE
    config = networks.DecoderConfig(start=str(folder), features=(), native=str(native), native_weight=1.0)
    cut = ClipsConfig(9, 16, 16)
    program = decoder.DecoderDistillation(config, networks.read_networks(config), blank_clips(cut), cut)
    assert program.module.config.decoder_num_features == FEATURES
    state = jax.jit(program.init_state)(jax.random.key(0), program.frozen())
    stored = checkpoint.load(folder)[1]
    for name in ('decoder', 'post_quant_conv'):
        assert jax.tree.all(jax.tree.map(np.array_equal, state.params[name], stored[name]))


@pytest.mark.slow
def test_a_fresh_decoder_sees_normalized_latents():
    module = VideoVAE(VideoVAEConfig(decoder_num_features=FEATURES))
    color = jnp.array([0.5, -0.25, 0.0])
    params = fresh_small_decoder(module, jax.random.key(0), color)
    latents = jax.random.normal(jax.random.key(1), (1, 3, 4, 4, 16))
    layer = params['post_quant_conv']
    got = jnp.einsum('bthwi,io->bthwo', latents, layer['kernel'][0, 0]) + layer['bias']
    assert np.allclose(got, normalize(latents, first_frame=False), atol=1e-5)
    frames = module.apply({'params': params}, latents, method='decode')
    assert np.allclose(frames.mean(axis=(0, 1, 2, 3)), color, atol=0.1)
    own = module.init(jax.random.key(0), *example_inputs(module))['params']
    assert jax.tree.structure(params) == jax.tree.structure({name: own[name] for name in networks.DECODER})


def test_folders_are_refused_with_a_remedy(native, tmp_path):
    config = functools.partial(networks.DecoderConfig, start=str(native))
    with pytest.raises(InputError, match=r'start is empty'):
        networks.read_networks(dataclasses.replace(config(), start=''))
    with pytest.raises(InputError, match='has no small decoder; give its widths'):
        networks.read_networks(config(features=()))
    with pytest.raises(InputError, match='give 4 widths'):
        config(features=(8, 8))
    with pytest.raises(InputError, match=r'holds a ContextAdapter; pass .* an AsymmetricCausalVideoVAE or CausalV'):
        networks.read_networks(dataclasses.replace(config(), start=str(TINY_CHECKPOINT / 'context_adapter')))
    released = str(TINY_CHECKPOINT / 'causal_video_vae')
    with pytest.raises(InputError, match='another encoder than start'):
        networks.read_networks(dataclasses.replace(config(native=str(native)), start=released))
    with pytest.raises(InputError, match='holds an AsymmetricCausalVideoVAE; pass the folder of a CausalVideoVAE'):
        networks.read_networks(config(native=released))
    changed = settings(released, tmp_path)
    changed.decoder.native_weight = 1.0
    with pytest.raises(InputError, match='there is no native decoder'):
        decoder.RECIPE.run(changed)


def test_full_size_has_a_plan_without_weights_or_data(capsys):
    config = presets.get_config('')
    config.decoder.native_weight = 1.0
    config.loop.mesh = {'data': 1, 'fsdp': 8, 'tensor': 1}
    decoder.RECIPE.run(config, dry_run=True)
    out = capsys.readouterr().out
    assert 'batch  video  [32, 17, 256, 256, 3]  uint8' in out
    assert 'frozen/native/decoder' in out and 'fsdp' in out
    assert tuple(config.decoder.features) == FULL.video_vae.decoder_num_features
    assert freeze(networks.DecoderConfig, config.decoder.to_dict()).native_weight == 1.0


@pytest.mark.long
def test_records_tell_the_training(unbroken):
    record = json.loads((unbroken / 'result' / 'decoder.json').read_text())
    assert record['iterations'] == STEPS and record['native_weight'] == 0.1
    _, params = checkpoint.load(unbroken / 'result' / folders.VIDEO_VAE)
    assert record['encoder'] == decoder.digest({name: params[name] for name in ('encoder', 'quant_conv')})
