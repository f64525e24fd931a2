"""Tests of random checkpoints: the released layout at any size, usable by the whole pipeline."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from neodragon_jax import random_checkpoint
from neodragon_jax.__main__ import main as generate
from neodragon_jax.base.video import read_mp4
from neodragon_jax.checkpoint import random_params
from neodragon_jax.checkpoint.abstract import abstract_params, tensor_shapes
from neodragon_jax.checkpoint.classes import COMPONENTS
from neodragon_jax.checkpoint.names.text import T5_TIED_NAMES
from neodragon_jax.config.neodragon import TINY, T5EncoderConfig
from support.goldens import GOLDENS

TINY_CHECKPOINT = GOLDENS / 'tiny_checkpoint'


def command(out, *more):
    return ['--size', 'tiny', '--tokenizers', str(TINY_CHECKPOINT), '--out', str(out), *more]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp('random')
    assert random_checkpoint.main(command(folder)) == 0
    return folder


def tensors(folder):
    (path,) = folder.glob('*.safetensors')
    return load_file(path)


@pytest.mark.parametrize('name', sorted({path.parent.name for path in TINY_CHECKPOINT.glob('*/*.safetensors')}))
def test_has_the_tensors_of_the_release(name, checkpoint):
    if name in random_params.MULTISTEP:
        assert not (checkpoint / name).exists()  # only what the hybrid system needs, unless asked for
        return
    ours, released = tensors(checkpoint / name), tensors(TINY_CHECKPOINT / name)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in released.items()}
    # Zero weights would hide errors in measurements.
    assert all(value.any() for value in ours.values())


RELEASED = [name for name in random_params.PRESETS['full'] if name != 'quicksrnet']  # no weights in the release


@pytest.mark.parametrize('name', RELEASED)
def test_full_sizes_are_those_of_the_release(name):
    part, manifest = random_params.PRESETS['full'][name], json.loads((GOLDENS / 'manifest_full.json').read_text())
    want = manifest[name.removesuffix('_multistep_t2v')]
    want = manifest[want['same_as']] if 'same_as' in want else want
    shapes = {key: list(leaf.shape) for key, leaf in tensor_shapes(part.kind, part.config).items()}
    assert shapes == {key: shape for key, shape in want['keys'].items() if key not in T5_TIED_NAMES}


def test_goes_on_with_what_is_missing(checkpoint, tmp_path, capsys):
    folder = tmp_path / 'checkpoint'
    shutil.copytree(checkpoint, folder)
    before = (folder / 'context_adapter/diffusion_pytorch_model.safetensors').read_bytes()
    (folder / 'context_adapter/config.json').unlink()
    assert random_checkpoint.main(command(folder)) == 0
    assert '1 components made, 10 kept' in capsys.readouterr().out
    assert (folder / 'context_adapter/diffusion_pytorch_model.safetensors').read_bytes() == before


def test_like_trained():
    """Heavy tails at the same deviation, smaller at branch ends; the same few channels are large in all gains."""
    # 64 heads of 16 dimensions: 1024 channels, two large.
    config = dataclasses.replace(TINY.denoiser, num_attention_heads=64, caption_projection_dim=1024)
    plain = random_params.random_params('PyramidMMDiT', config, 0)
    params = random_params.like_trained(plain, 0)
    mlp, before = (tree['blocks_0']['image_mlp'] for tree in (params, plain))
    kernel, old = mlp['linear_1']['kernel'], before['linear_1']['kernel']
    assert kernel.std() == pytest.approx(old.std(), rel=0.02)
    assert (kernel**4).mean() / (kernel**2).mean() ** 2 > 5 > 3.1 > (old**4).mean() / (old**2).mean() ** 2
    branches = 4 * (config.num_layers - 1) + 2  # the last block's text stream has none
    shrunk = mlp['linear_2']['kernel'].std() / before['linear_2']['kernel'].std()
    assert shrunk == pytest.approx(branches**-0.5, rel=0.02)
    large = [
        [set(np.flatnonzero(row > 1).tolist()) for row in params[name][stream]['linear']['bias']]
        for name, stream in (('modulators_0', 'image'), ('modulators_0', 'text'), ('last_modulator', 'text'))
    ]
    channels, nothing = large[0][1], set()
    assert len(channels) == 2 and large[0] == [nothing, channels, nothing, nothing, channels, nothing] == large[1]
    assert large[2] == [channels, nothing], 'the last text norm has its scale first'
    assert params['blocks_0']['image_query_norm']['scale'].max() < 1.2


@pytest.mark.parametrize(
    ('name', 'branches'),
    [
        ('text_encoder', 2 * 12),
        ('text_encoder_3', 2 * 12),
        ('context_adapter', 0),
        ('diffusion_transformer_320p', 4 * 17 + 2),
        ('causal_video_vae', 9 + (4 * 2 + 3)),  # memory blocks, and the encoder: four grids and the middle
        ('ssd_1b_vae', (4 * 2 + 3) + (4 * 3 + 3)),
        ('ssd_1b_unet', 6 + 9 + 1 + 3 * 34 + 10),  # residual blocks, three branches a block, transformers
        ('quicksrnet', 0),
    ],
)
def test_residual_branches_are_found_in_every_component(name, branches):
    part = random_params.PRESETS['full'][name]
    flat = traverse_util.flatten_dict(abstract_params(COMPONENTS[part.kind].build(part.config)))
    assert len(random_params.branch_ends(flat)) == branches


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (('--components', 'context_adaptor'), 'no such component. Did you mean "context_adapter"'),
        (('--tokenizers', '/nowhere'), '/nowhere: no tokenizer in it'),
    ],
)
def test_bad_input(more, message, tmp_path, capsys):
    assert random_checkpoint.main(command(tmp_path / 'out', *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


@pytest.mark.long
def test_hybrid_video_at_twice_the_size(checkpoint, tmp_path, capsys):
    """Prompt, first frame, few-step denoiser, decoder, super-resolution: the whole system, one module at a time."""
    size = ['--frames', '9', '--height', '64', '--width', '64']
    upscale = ['--upscale', str(checkpoint / 'quicksrnet')]
    small = ['--dtype', 'bfloat16', '--low-memory', '--profile']
    more = ['--prompt', 'a cat', '--out', str(tmp_path), *size, *upscale, *small]
    assert generate(['--checkpoint', str(checkpoint), *more]) == 0
    assert read_mp4(tmp_path / 'a cat-0.mp4').shape == (9, 128, 128, 3)
    assert 'Peak memory' in capsys.readouterr().out


def test_random_t5_attends_softly():
    """Scores, which T5 does not divide by sqrt(head width), have a deviation of about 1."""
    config = T5EncoderConfig(vocab_size=32, d_model=256, d_kv=64, d_ff=64, num_layers=1, num_heads=4)
    attention = random_params.random_params('T5EncoderModel', config, 0)['block_0']['attention']
    x = np.random.default_rng(0).standard_normal((200, 256))
    query, key = (x @ attention[name]['kernel'].reshape(256, 4, 64).swapaxes(0, 1) for name in ('query', 'key'))
    scores = query @ key.swapaxes(1, 2)
    print(scores.std())
    assert 0.8 < scores.std() < 1.25
