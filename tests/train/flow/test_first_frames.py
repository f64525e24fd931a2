"""First frames of teacher samples: the checkpoint's own source by default, and drawn as in generation."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from configs import dmd as dmd_settings
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.fingerprint import fingerprint
from neodragon_jax.generation import pipeline
from neodragon_jax.generation.consistency_sampler import DrawnPictureNoise
from neodragon_jax.generation.loading import load_checkpoint
from neodragon_jax.generation.options import ModelOptions
from support.dmd_runs import PROMPTS, write_pictures
from support.goldens import TINY_CHECKPOINT, relative_error
from train import teacher_samples
from train.data import SampleSource
from train.dmd.program import RECIPE
from train.flow.first_frames import drawn_frames
from train.flow.teacher_sampler import make_request
from train.runtime.sharding import MeshConfig, make_mesh

SEED, SIDE = 3, 64


def arguments(folder: pathlib.Path, *more: str) -> list[str]:
    """Return the command line of small samples of PROMPTS."""
    (folder / 'prompts.txt').write_text('\n'.join(PROMPTS))
    size = ['--frames', '9', '--height', str(SIDE), '--width', str(SIDE), '--steps', *'111', '--first-steps', *'111']
    files = ['--prompts-file', str(folder / 'prompts.txt'), '--out', str(folder / 'samples'), '--count', '4']
    return ['--checkpoint', str(TINY_CHECKPOINT), *files, *size, '--dtype', 'float32', '--seed', str(SEED), *more]


def linked_checkpoint(folder: pathlib.Path, without: str = '') -> pathlib.Path:
    """Make a checkpoint of the miniature's components, perhaps without one."""
    folder.mkdir()
    for part in TINY_CHECKPOINT.iterdir():
        if part.name != without:
            (folder / part.name).symlink_to(part)
    return folder


def drawn_pictures() -> np.ndarray:
    """Return the pictures that generation draws for the first videos of PROMPTS, as bytes."""
    loaded = load_checkpoint(ModelOptions(checkpoint=str(TINY_CHECKPOINT), mode='hybrid'), jax.devices()[:1])
    keys = pipeline.sample_keys(SEED, PROMPTS, [0] * len(PROMPTS))
    texts = [prompt + loaded.defaults.prompt_modifier for prompt in PROMPTS]
    model, places = loaded.first_frame_model(SIDE, SIDE), range(len(PROMPTS))
    return np.concatenate([model(texts[at : at + 1], DrawnPictureNoise(keys[at : at + 1])) for at in places])


@pytest.mark.long
def test_drawn_first_frames_are_those_of_generation(tmp_path, capsys):
    """Two routes: the command draws; generation draws the pictures of the same keys, and the command reads them."""
    assert teacher_samples.main(arguments(tmp_path)) == 0
    assert 'drawn by the checkpoint' in capsys.readouterr().out
    drawn = SampleSource(tmp_path / 'samples')
    assert drawn.protocol['first_frame'] == 'model'
    shutil.move(tmp_path / 'samples', tmp_path / 'drawn')
    (tmp_path / 'pictures').mkdir()
    for number, picture in enumerate(drawn_pictures()):
        Image.fromarray(picture).save(tmp_path / 'pictures' / f'{number}.png')
    assert teacher_samples.main(arguments(tmp_path, '--first-frame', str(tmp_path / 'pictures'))) == 0
    drawn, given = SampleSource(tmp_path / 'drawn'), SampleSource(tmp_path / 'samples')
    for index in range(len(PROMPTS)):
        # One picture per device here, one picture there: some bytes differ by one.
        assert relative_error(drawn[index]['latents'], given[index]['latents']) < 0.01
    # The fourth sample is the second of the first prompt: another drawing.
    assert relative_error(drawn[3]['latents'][0], given[3]['latents'][0]) > 0.02


@pytest.mark.long
def test_first_frames_alone_are_the_data_of_the_recipe_prompts(tmp_path):
    assert teacher_samples.main(arguments(tmp_path, '--frames', '1')) == 0
    settings = dmd_settings.get_config('tiny-prompts')
    settings.update(data=str(tmp_path / 'samples'), workdir=str(tmp_path / 'run'))
    training = RECIPE.load(RECIPE.read(settings))
    stored, given = SampleSource(tmp_path / 'samples')[1]['latents'], training.source[1]['latents']
    assert stored.shape == (1, SIDE // 8, SIDE // 8, 16) and given.shape == (settings.dmd.frames, *stored.shape[1:])
    np.testing.assert_array_equal(given[:1], stored)
    assert not given[1:].any()


def test_pictures_are_drawn_one_at_a_time_on_every_device():
    """Whatever the batch, so that its memory does not grow with it; each prompt with its own key."""
    mesh, calls = make_mesh(MeshConfig(2, 2, 1), jax.devices()[:4]), []

    def model(texts, noise, shard):
        del shard
        calls.append(list(texts))
        shades = jax.vmap(lambda key: jax.random.randint(key, (), 0, 255))(noise.keys)
        return np.broadcast_to(np.asarray(shades, np.uint8)[:, None, None, None], (len(texts), 8, 8, 3))

    keys, texts = jax.random.split(jax.random.key(0), 8), [str(number) for number in range(8)]
    frames = drawn_frames(model, (4, 4), mesh)(range(8), texts, keys)
    assert calls == [texts[:4], texts[4:]] and frames.shape == (8, 1, 4, 4, 3)
    want = jax.vmap(lambda key: jax.random.randint(key, (), 0, 255))(keys)
    np.testing.assert_allclose(frames[:, 0, 0, 0, 0], np.asarray(want) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ('hybrid', 'given', 'source'),
    [('model', '', 'model'), ('denoiser', '', 'generated'), ('denoiser', 'model', 'model'), ('model', 'generated', '')],
)
def test_the_default_is_the_source_of_the_students_videos(tmp_path, hybrid, given, source):
    root = linked_checkpoint(tmp_path / 'checkpoint')
    (root / 'generation.json').write_text(f'{{"modes": {{"hybrid": {{"first_frame": "{hybrid}"}}}}}}')
    options = teacher_samples.parse_options(arguments(tmp_path, *(['--first-frame', given] if given else [])))
    request = make_request(dataclasses.replace(options, checkpoint=root))
    assert request.first_frame == (source or given) and request.pictures is None
    record = request.protocol()
    assert record['first_frame'] == request.first_frame
    assert record.get('first_frame_model') == (
        fingerprint(root / folders.FIRST_FRAME_UNET) if 'model' in source else None
    )


def test_pictures_are_a_source(tmp_path):
    write_pictures(tmp_path / 'pictures')
    options = teacher_samples.parse_options(arguments(tmp_path, '--first-frame', str(tmp_path / 'pictures')))
    request = make_request(options)
    assert request.first_frame == 'pictures' and len(request.pictures or []) == len(PROMPTS)


def test_an_unknown_source_is_refused_with_the_known_ones(tmp_path):
    options = teacher_samples.parse_options(arguments(tmp_path, '--first-frame', 'Model'))
    with pytest.raises(InputError, match=r'no such folder\. Did you mean "model"\? Give model, generated, a folder'):
        make_request(options)


def test_a_checkpoint_without_the_model_is_refused_with_the_remedy(tmp_path):
    root = linked_checkpoint(tmp_path / 'checkpoint', without=folders.FIRST_FRAME_UNET)
    options = dataclasses.replace(teacher_samples.parse_options(arguments(tmp_path)), checkpoint=root)
    with pytest.raises(InputError, match=r'--first-frame model: .*ssd_1b_unet.* --first-frame generated') as error:
        make_request(options)
    assert '\n' not in str(error.value)
