"""Super-resolution training: pairs of crops, and the program."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs import super_resolution as presets
from neodragon_jax.base import video
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.config.super_resolution import VARIANTS
from neodragon_jax.models.super_resolution import upscale
from support.glossary import unexplained
from support.training_runs import copy_killed, digests
from train.data import crops as frames
from train.data.video_files import PICTURES, VIDEOS
from train.runtime import loop
from train.runtime.metrics import read_metrics
from train.runtime.settings import freeze
from train.super_resolution import program as super_resolution


def nearest(x: np.ndarray, factor: int) -> np.ndarray:
    return x.repeat(factor, axis=-3).repeat(factor, axis=-2)


# --- Pairs of crops ---------------------------------------------------------------------------------------------------


def waves(height: int, width: int, seed: int) -> np.ndarray:
    """Return a picture of a few smooth waves per color, which a network can enlarge better than by repetition."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((height, width))
    picture = np.zeros((height, width, 3))
    for color in range(3):
        for _ in range(4):
            frequency, phase = rng.uniform(-0.9, 0.9, 2), rng.uniform(0, 2 * np.pi)
            picture[..., color] += np.sin(frequency[0] * rows + frequency[1] * columns + phase) / 8
    return ((picture + 0.5) * 255).astype(np.uint8)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Six pictures and a video, in two folders, and a file that is neither."""
    folder = tmp_path_factory.mktemp('frames')
    (folder / 'inner').mkdir()
    for index in range(6):
        Image.fromarray(waves(48 + index, 64, index)).save(folder / 'inner' / f'{index}.png')
    video.write_mp4(folder / 'clip.mp4', np.stack([waves(48, 64, 10 + index) for index in range(3)]))
    (folder / 'notes.txt').write_text('neither a video nor a picture')
    return folder


@pytest.mark.parametrize(('filter', 'factor'), [('lanczos', 2), ('bicubic', 3)])
def test_crops_show_the_same_place(tmp_path, filter, factor):
    """On an even gradient, a small pixel is the mean of the large ones that it covers, and shows its position."""
    rows, columns = np.indices((61, 97))
    Image.fromarray(np.stack([4 * rows, 2 * columns, rows + columns], axis=-1).astype(np.uint8)).save(
        tmp_path / 'a.png'
    )
    source = frames.CropSource(tmp_path, frames.CropConfig(24, per_file=64, rounds=3, filter=filter), factor)
    assert len(source) == 3
    sample = source[0]
    side = 24 // factor
    assert sample['small'].shape == (64, side, side, 3) and sample['large'].shape == (64, 24, 24, 3)
    means = sample['large'].reshape(64, side, factor, side, factor, 3).mean(axis=(2, 4))
    # The outermost pixels of the picture are missing on one side of the filter.
    assert np.abs(sample['small'] - means).max() <= 6
    assert np.abs(sample['small'] - means).mean() < 0.6
    steps = np.diff(sample['large'][..., 0].astype(int), axis=1)[:, 0, 0]
    assert set(steps) == {-4, 0, 4}  # upright, upside down, or on its side
    assert len(np.unique(sample['large'][..., 0].min(axis=(1, 2)))) > 10
    assert len(np.unique(sample['large'][..., 1].min(axis=(1, 2)))) > 10


def test_samples_depend_on_seed_and_index(data):
    make = lambda seed: frames.CropSource(data, frames.CropConfig(16, per_file=4, rounds=2, seed=seed), 2)
    source = make(0)
    assert len(source) == 14
    for index in (0, 3):
        assert np.array_equal(source[index]['large'], make(0)[index]['large'])
        assert not np.array_equal(source[index]['large'], source[index + 7]['large'])
        assert not np.array_equal(source[index]['large'], make(1)[index]['large'])
    assert source.metadata() == make(0).metadata() != make(1).metadata()


@pytest.mark.parametrize('suffix', [*VIDEOS, *PICTURES, '.AVI', '.WebP'])
def test_files_of_all_programs_are_taken(tmp_path, suffix):
    path = tmp_path / f'file{suffix}'
    if suffix.lower() in PICTURES:
        Image.fromarray(waves(48, 64, 0)).save(path)
    else:
        video.write_mp4(tmp_path / 'clip.mp4', waves(48, 64, 0)[None])
        (tmp_path / 'clip.mp4').rename(path)
    source = frames.CropSource(tmp_path, frames.CropConfig(16, per_file=1, rounds=1), 2)
    assert len(source) == 1 and source[0]['large'].shape == (1, 16, 16, 3)


def test_folders_without_crops_are_refused(data, tmp_path):
    with pytest.raises(InputError, match='no such folder'):
        frames.CropSource(tmp_path / 'none', frames.CropConfig(), 2)
    with pytest.raises(InputError, match=r'no \.mp4 or'):
        frames.CropSource(tmp_path, frames.CropConfig(), 2)
    with pytest.raises(InputError, match='128 is no multiple of the scaling factor 3'):
        frames.CropSource(data, frames.CropConfig(), 3)
    with pytest.raises(InputError, match=r'clip\.mp4 is 48x64, smaller than a crop of 64'):
        frames.CropSource(data, frames.CropConfig(64), 2)[0]
    with pytest.raises(InputError, match="filter is 'box'"):
        frames.CropConfig(filter='box')


# --- Training ---------------------------------------------------------------------------------------------------------


def settings(data, workdir, steps: int):
    config = presets.get_config('tiny')
    config.update({'data': str(data), 'workdir': str(workdir), 'crops': {'size': 16, 'per_file': 4}})
    config.loop.update({'steps': steps, 'log_every': 20, 'checkpoint_every': 100})
    return config


STEPS = 200


@pytest.fixture(scope='module')
def unbroken(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('unbroken')
    super_resolution.RECIPE.run(settings(data, workdir, STEPS))
    return workdir


def test_it_learns_more_than_nearest_neighbor(unbroken):
    """The network starts worse and ends better, including on a picture outside the training set."""
    first, *_, last = read_metrics(unbroken)
    assert not unexplained(last)
    assert first['loss'] > 0.9 * first['nearest_l1']
    assert last['loss'] < 0.6 * last['nearest_l1']
    assert last['psnr'] > first['psnr'] + 3

    module, params = checkpoint.load(unbroken / 'result' / super_resolution.NETWORK)
    assert module.config == VARIANTS['small']
    large = waves(64, 64, seed=99)
    small = np.asarray(Image.fromarray(large).resize((32, 32), Image.Resampling.LANCZOS))
    got = upscale(jax.jit(lambda x: module.apply({'params': params}, x)), small)
    error = lambda picture: np.abs(picture.astype(float) - large).mean()
    assert error(got) < 0.6 * error(nearest(small, 2))
    record = json.loads((unbroken / 'result' / 'super_resolution.json').read_text())
    assert record['variant'] == 'small' and record['iterations'] == STEPS and record['data']['size'] == 16


def test_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(data, unbroken, tmp_path):
    super_resolution.RECIPE.run(settings(data, copy_killed(unbroken, STEPS // 2, tmp_path), STEPS))
    assert len(digests(unbroken / 'result')) == 3
    assert digests(tmp_path / 'result') == digests(unbroken / 'result')


def test_other_data_do_not_continue_a_run(data, unbroken):
    changed = settings(data, unbroken, STEPS)
    changed.crops.filter = 'bicubic'
    with pytest.raises(InputError, match='data'):
        super_resolution.RECIPE.run(changed)


@pytest.mark.parametrize('mesh', [(8, 1, 1), (2, 2, 2)])
def test_large_variant_has_a_place_on_every_mesh(data, capsys, mesh):
    config = settings(data, 'unused', 1)
    config.super_resolution.variant = 'large'
    config.loop.mesh = dict(zip(('data', 'fsdp', 'tensor'), mesh, strict=True))
    super_resolution.RECIPE.run(config, dry_run=True)
    out = capsys.readouterr().out
    assert 'batch  small  [8, 4, 8, 8, 3]  uint8' in out and 'anchor/kernel' in out


def test_presets_are_valid():
    values = presets.get_config('').to_dict()
    assert freeze(frames.CropConfig, values['crops']) == frames.CropConfig()
    config = freeze(super_resolution.SuperResolutionTraining, values['super_resolution'])
    assert config.decay_steps == freeze(loop.LoopConfig, values['loop'] | {'workdir': 'x'}).steps
    with pytest.raises(InputError, match='tinny'):
        presets.get_config('tinny')
    empty = presets.get_config('tiny')
    with pytest.raises(InputError, match=r'config\.data is empty'):
        super_resolution.RECIPE.run(empty)
