"""Components of different models are refused by their sizes, before any weight is read: these folders have none."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import folders, shipped
from neodragon_jax.generation import pipeline
from support.goldens import TINY_CHECKPOINT

TINY = pathlib.Path(TINY_CHECKPOINT)
SHAPES = shipped.find('moving_shapes', (), 'checkpoint')


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
    """A checkpoint with the configs and tokenizers of the tiny one."""
    ignored = shutil.ignore_patterns('*.safetensors', 'ssd_1b*')
    return pathlib.Path(shutil.copytree(TINY, tmp_path / 'checkpoint', ignore=ignored))


def take(root: pathlib.Path, name: str, source: pathlib.Path) -> None:
    shutil.rmtree(root / name)
    shutil.copytree(source, root / name, ignore=shutil.ignore_patterns('*.safetensors'))


def test_components_that_fit_reach_their_weights(root):
    with pytest.raises(InputError, match=r'model\.safetensors'):
        pipeline.load(root)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        (folders.STUDENT_ADAPTER, r'context_adapter takes text states of width 64, but \S*text_encoder_3 gives \d+:'),
        (folders.STUDENT, r'diffusion_transformer_320p takes text states of width 96, but \S*context_adapter gives'),
    ],
)
def test_a_component_of_another_checkpoint_is_refused(root, name, message):
    take(root, name, SHAPES / name)
    with pytest.raises(InputError, match=message):
        pipeline.load(root)


@pytest.mark.parametrize(
    ('name', 'size', 'message'),
    [
        (
            folders.T5,
            'out_dim',
            r'context_adapter takes text states of width \d+, but \S*text_encoder_3 gives 76: they',
        ),
        (folders.CLIP_L, 'projection_dim', r'320p takes a pooled vector of width 48, but \S* and \S* give 104: they'),
        (folders.CLIP_G, 'projection_dim', r'320p takes a pooled vector of width 48, but \S* and \S* give 96: they'),
        (folders.VIDEO_VAE, 'encoder_out_channels', r'vae takes latents of channels 76, but \S*320p gives 16: they'),
    ],
)
def test_sizes_that_do_not_fit_are_refused(root, name, size, message):
    config = root / name / 'config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | {size: 76}))
    with pytest.raises(InputError, match=message):
        pipeline.load(root)


def test_a_student_of_another_checkpoint_is_refused():
    student, adapter = SHAPES / folders.STUDENT, SHAPES / folders.STUDENT_ADAPTER
    with pytest.raises(InputError, match='or a student that was distilled from it'):
        pipeline.load(TINY, denoiser=student, adapter=adapter)
    with pytest.raises(InputError, match='or a student that was distilled from it'):
        pipeline.load(TINY, denoiser=student)


def test_exchanged_towers_are_refused(root):
    take(root, folders.CLIP_L, TINY / folders.CLIP_G)
    take(root, folders.CLIP_G, TINY / folders.CLIP_L)
    with pytest.raises(InputError, match=r'text_encoder and \S*text_encoder_2 are exchanged: the first must be CLIP-L'):
        pipeline.load(root)


def test_a_class_of_another_role_is_refused(root):
    take(root, folders.CLIP_L, TINY / folders.T5)
    with pytest.raises(InputError, match='text_encoder: holds a T5EncoderWithProjection; pass the folder of a CLIP'):
        pipeline.load(root)
