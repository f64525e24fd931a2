"""Latents and conditionings of clips are those that the pipeline computes; interrupted and shared runs agree."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.abstract import example_inputs
from neodragon_jax.config.neodragon import CausalEncoderConfig
from neodragon_jax.config.pyramid_flow import PyramidFlowVAEConfig
from neodragon_jax.generation import pipeline
from neodragon_jax.generation.param_store import Store
from neodragon_jax.generation.tokens import DEFAULT_NEGATIVE_PROMPT, Tokenizers
from neodragon_jax.models.native_decoder import NativeVAE
from neodragon_jax.models.vae import normalize, posterior_mean
from support.goldens import TINY_CHECKPOINT, relative_error
from train import latents
from train.data import ArraySpec, RecordSpec, SampleSource, SampleWriter, mp4_bytes
from train.data.clip_source import CLIP_SPEC, ClipSource
from train.data.mixture import Mixture
from train.dmd import program as dmd

COUNT, FRAMES, SIDE = 11, 9, 64
CAPTIONS = [f'a dragon née №{index} 🐉' for index in range(COUNT)]


def frames_of(index: int, frames: int = FRAMES) -> np.ndarray:
    rng = np.random.default_rng(index)
    coarse = rng.integers(0, 255, (frames, 8, 8, 3), np.uint8)
    return coarse.repeat(SIDE // 8, axis=1).repeat(SIDE // 8, axis=2)


def write_clips(folder: pathlib.Path, frames: int = FRAMES, count: int = COUNT, raw: bool = False) -> None:
    """Write clips as train.captioned_clips does, or as plain arrays."""
    protocol = {'frames': frames, 'fps': 24, 'height': SIDE, 'width': SIDE, 'quality': 12}
    spec = RecordSpec({'video': ArraySpec((frames, SIDE, SIDE, 3), 'uint8')}) if raw else CLIP_SPEC
    with SampleWriter(folder, spec, count, protocol=protocol, name='captioned_clips') as writer:
        for index in range(count):
            video = frames_of(index, frames)
            stored = video if raw else mp4_bytes.encode(video, 24, 12)
            more = {'prompt': CAPTIONS[index], 'file': f'{index}.mp4', 'start': 0.5}
            writer.append({'index': index, 'video': stored} | more)


def arguments(clips, out, *more: str) -> list[str]:
    given = ['--checkpoint', str(TINY_CHECKPOINT), '--clips', str(clips), '--out', str(out), '--dtype', 'float32']
    return [*given, '--window', '8', '--samples-per-shard', '4', '--store-dtype', 'float32', *more]


@pytest.fixture(scope='module')
def clips(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp('clips')
    write_clips(folder / '64x64')
    write_clips(folder / 'stills', frames=1, count=3)
    return folder


@pytest.fixture(scope='module')
def means(clips) -> pathlib.Path:
    out = clips.parent / 'latents-means'
    assert latents.main(arguments(clips, out, '--posterior', 'mean')) == 0
    return out


def test_a_sample_is_what_the_pipeline_computes(clips, means):
    source, videos = SampleSource(means / '64x64', verify=True), ClipSource(clips / '64x64')
    assert len(source) == COUNT
    vae, params = checkpoint.load(TINY_CHECKPOINT / 'causal_video_vae')
    components = pipeline.load(TINY_CHECKPOINT, 'monolithic', store=Store(one_at_a_time=True))
    prompt = components.encode_prompt([CAPTIONS[3]])
    sample, video = source[3], videos[3]['video']
    scaled = jnp.asarray(video, jnp.float32)[None] / 127.5 - 1
    moments = jax.jit(lambda video: vae.apply({'params': params}, video, method='encode'))(scaled)
    assert relative_error(sample['latents'], normalize(posterior_mean(moments))[0]) < 2e-5
    assert relative_error(sample['text'], prompt.text[0]) < 2e-5
    assert relative_error(sample['pooled'], prompt.pooled[0]) < 2e-5
    np.testing.assert_array_equal(sample['text_mask'], prompt.mask[0])
    assert (int(sample['units']), sample['prompt'], sample['file']) == (2, CAPTIONS[3], '3.mp4')
    given = {'negative': DEFAULT_NEGATIVE_PROMPT, 'null': ''}
    for kind, text in given.items():
        assert relative_error(getattr(source, kind)()['text'], components.encode_prompt([text]).text[0]) < 2e-5


def test_pictures_become_one_latent_and_mix_with_videos(means):
    still = SampleSource(means / 'stills')[1]
    assert still['latents'].shape == (1, SIDE // 8, SIDE // 8, 16)
    mixture = Mixture([SampleSource(means / '64x64'), SampleSource(means / 'stills')], [2, 1])
    assert mixture[len(mixture) - 1]['units'] == 1
    assert mixture[len(mixture) - 1]['latents'].shape[0] == 2
    assert mixture.null()['text'].shape == still['text'].shape


def test_the_step_distillation_takes_them(means):
    config = dmd.DMDConfig(checkpoint=str(TINY_CHECKPOINT))
    program = dmd.load_program(config, SampleSource(means / '64x64'))
    assert program.frames == 2
    assert program.negative.text.shape == (128, 64)


@pytest.mark.long
def test_posterior_samples_depend_on_clip_index_and_seed_alone(clips, means, tmp_path):
    given = arguments(clips / '64x64', tmp_path / 'a')
    assert latents.main(given) == 0
    whole = SampleSource(tmp_path / 'a')
    spread = relative_error(whole[0]['latents'], SampleSource(means / '64x64')[0]['latents'])
    assert spread > 1e-3
    # A killed run is continued: one shard exists, the others do not, and other clips share the batch.
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    for number in (1, 2):
        (tmp_path / 'b' / f'latents-train.array_record-{number:05d}-of-00003').unlink()
        (tmp_path / 'b' / 'shards' / f'{number:05d}.json').unlink()
    assert latents.main(arguments(clips / '64x64', tmp_path / 'b')) == 0
    for index in range(COUNT):
        resumed = SampleSource(tmp_path / 'b')[index]
        assert relative_error(resumed['latents'], whole[index]['latents']) < 1e-6
    assert latents.main([*arguments(clips / '64x64', tmp_path / 'b'), '--seed', '1']) == 2


@pytest.mark.long
def test_the_encoder_may_be_that_of_a_native_autoencoder(clips, means, tmp_path):
    """Latents can be written before the small decoder is trained."""
    root = tmp_path / 'checkpoint'
    root.mkdir()
    for folder in TINY_CHECKPOINT.iterdir():
        if folder.name != folders.VIDEO_VAE:
            (root / folder.name).symlink_to(folder)
    vae, params = checkpoint.load(TINY_CHECKPOINT / folders.VIDEO_VAE)
    shared = {field.name: getattr(vae.config, field.name) for field in dataclasses.fields(CausalEncoderConfig)}
    decoder = {'decoder_block_out_channels': (4, 4, 4, 4), 'decoder_layers_per_block': (1, 1, 1, 1)}
    native = NativeVAE(PyramidFlowVAEConfig(**shared, **decoder, decoder_norm_num_groups=2))
    drawn = jax.jit(lambda key: native.init(key, *example_inputs(native))['params'])(jax.random.key(0))
    checkpoint.save(
        root / folders.VIDEO_VAE, native, {**drawn, 'encoder': params['encoder'], 'quant_conv': params['quant_conv']}
    )
    given = ['--checkpoint', str(root), *arguments(clips / 'stills', tmp_path / 'out', '--posterior', 'mean')[2:]]
    assert latents.main(given) == 0
    got, want = SampleSource(tmp_path / 'out'), SampleSource(means / 'stills')
    for index in range(len(want)):
        assert np.allclose(got[index]['latents'], want[index]['latents'], atol=1e-6)


def test_two_processes_share_the_shards(clips, means, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    for number in (1, 0):
        shares = contextlib.nullcontext((number, 2))
        monkeypatch.setattr(latents, 'separate_shares', lambda *given, shares=shares: shares)
        monkeypatch.setattr(jax, 'process_index', lambda number=number: number)
        assert not (tmp_path / 'features.json').exists()
        assert latents.main(arguments(clips / '64x64', tmp_path, '--posterior', 'mean')) == 0
    shared, alone = SampleSource(tmp_path, verify=True), SampleSource(means / '64x64')
    for index in range(COUNT):
        assert shared[index]['prompt'] == alone[index]['prompt']
        assert relative_error(shared[index]['latents'], alone[index]['latents']) < 1e-6


def test_plain_arrays_and_other_texts(clips, tmp_path):
    write_clips(tmp_path / 'raw', count=2, raw=True)
    for content in ('t5', 'ids'):
        assert latents.main(arguments(tmp_path / 'raw', tmp_path / content, '--text', content)) == 0
    t5, ids = SampleSource(tmp_path / 't5'), SampleSource(tmp_path / 'ids')
    assert set(t5.spec.arrays) == {'latents', 'units', 't5', 'pooled', 'text_mask'}
    module, params = checkpoint.load(TINY_CHECKPOINT / 'text_encoder_3')
    tokens = Tokenizers.load(TINY_CHECKPOINT)([CAPTIONS[1]])
    states = jax.jit(module.apply)({'params': params}, tokens.t5_ids, tokens.t5_mask)
    assert relative_error(t5[1]['t5'], states[0]) < 2e-5
    assert set(ids.spec.arrays) == {'latents', 'units', 'ids', 'text_mask', 'clip_l_ids', 'clip_g_ids'}
    np.testing.assert_array_equal(ids[1]['ids'], tokens.t5_ids[0])
    np.testing.assert_array_equal(ids[1]['clip_g_ids'], tokens.clip_g_ids[0])
    np.testing.assert_array_equal(ids.null()['ids'], Tokenizers.load(TINY_CHECKPOINT)(['']).t5_ids[0])
    assert 'file' not in ids[0]


def test_bfloat16_is_what_training_stores(clips, tmp_path):
    given = arguments(clips / 'stills', tmp_path, '--store-dtype', 'bfloat16', '--dtype', 'bfloat16')
    assert latents.main(given) == 0
    manifest = json.loads((tmp_path / 'manifest.json').read_text())
    types = {name: array['dtype'] for name, array in manifest['spec']['arrays'].items()}
    assert types == {
        'latents': 'bfloat16', 'units': 'int32', 'text': 'bfloat16', 'pooled': 'bfloat16', 'text_mask': 'int32'
    }  # fmt: skip
    assert {'vae', 'adapter', 't5', 'clip_l', 'clip_g', 'clips', 'posterior'} <= manifest['protocol'].keys()


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--clips', 'nowhere'], '--clips nowhere: no such folder'),
        (['--clips', '.'], 'no dataset in it'),
        (['--window', '12'], '--window is 12; give a multiple of 8'),
        (['--batch', '0'], '--batch is 0'),
        (['--text-encoder', 'X'], '--text-encoder needs --text t5'),
        (['--text', 't5', '--text-encoder', f'{TINY_CHECKPOINT}/context_adapter'], 'holds a ContextAdapter'),
        (['--checkpoint', 'nowhere'], 'nowhere: no such checkpoint folder'),
    ],
)
def test_wrong_arguments_are_one_line(clips, tmp_path, capsys, more, message):
    assert latents.main([*arguments(clips / 'stills', tmp_path), *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1


def test_latents_are_no_clips(means, tmp_path, capsys):
    assert latents.main(arguments(means / 'stills', tmp_path)) == 2
    assert 'no video; pass a folder of train.captioned_clips' in capsys.readouterr().err
