"""The world of moving shapes: drawings match their captions, samples depend on their indices only, and the split is
correct."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import re

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import read_mp4
from train import moving_shapes
from train.data import SampleSource
from train.moving_shapes import write_samples
from train.runtime.loader import Loader
from train.runtime.sharding import MeshConfig, batch_sharding, make_mesh
from train.shapes.captions import caption, parse
from train.shapes.drawing import draw, track
from train.shapes.source import MovingShapesSource
from train.shapes.world import COLORS, CPU, DIRECTIONS, GPU, REACHES, SIZES, SPEEDS, Scene, Traits

BOTH = pytest.mark.parametrize('world', [CPU, GPU], ids=['cpu', 'gpu'])
RED_CIRCLE = Traits('small', 'red', 'circle', 'right', '', 'blue')


def alpha_of(clip: np.ndarray, traits: Traits) -> np.ndarray:
    """Return the share of the shape's color in each pixel."""
    background, color = (np.array(COLORS[name], float) for name in (traits.background, traits.color))
    ray = color - background
    return (clip - background) @ ray / (ray @ ray)


@BOTH
def test_every_caption_reads_back(world):
    for traits in world.combinations('all'):
        assert parse(caption(traits)) == traits


def test_captions_have_one_canonical_form_and_many_wordings():
    assert caption(RED_CIRCLE) == 'a small red circle moves right on a blue background'
    slow = GPU.combinations('all')[0]._replace(speed='slowly')
    assert caption(slow) == 'a small red circle slowly moves right on a blue background'
    wordings = {caption(slow, seed) for seed in range(200)}
    assert len(wordings) > 50
    assert all(parse(wording) == slow for wording in wordings)
    assert 'against a blue background, a little red disc slowly goes to the right' in wordings
    assert parse('  A small RED circle moves right  on a blue background. ') == RED_CIRCLE


@pytest.mark.parametrize(
    'text',
    [
        '',
        'a dog runs on the beach',
        'a small red circle moves right',
        'a small red circle moves right on a blue background, cinematic',
        'a tiny red circle moves right on a blue background',
        'a small red blue circle moves right on a blue background',
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(InputError, match='no caption of moving shapes; write one like "a small red circle'):
        parse(text)


@BOTH
def test_split(world):
    train, held_out = world.combinations('train'), world.combinations('held_out')
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(world.combinations('all'))
    assert len(held_out) == len(train + held_out) / world.held_out
    # Whatever is chosen for all attributes but one, training has it.
    for left_out, name in enumerate(Traits._fields):
        if len(world.values[left_out]) > 1:
            rest = {tuple(traits[:left_out] + traits[left_out + 1 :]) for traits in train}
            count = math.prod(len(words) for words in world.values) // len(world.values[left_out])
            assert len(rest) == count, name


def test_split_is_fixed():
    """Checkpoints are compared on it: another order of the words would mix training and evaluation."""
    assert len(CPU.combinations('held_out')) == 24 and len(GPU.combinations('held_out')) == 216
    assert not CPU.is_held_out(RED_CIRCLE) and not GPU.is_held_out(RED_CIRCLE._replace(speed='slowly'))
    assert CPU.is_held_out(RED_CIRCLE._replace(direction='up'))
    assert GPU.is_held_out(Traits('large', 'magenta', 'triangle', 'up', 'slowly', 'blue'))


def test_no_held_out_caption_is_trained_on_in_any_wording():
    for world in (CPU, GPU):
        held_out, train = (
            {caption(traits, seed) for traits in world.combinations(split) for seed in range(20)}
            for split in ('held_out', 'train')
        )
        assert len(held_out) > 300 and not held_out & train


@BOTH
def test_scenes_depend_on_seed_and_index_only(world):
    scenes = [world.scene(7, index) for index in range(300)]
    assert scenes == [world.scene(7, index) for index in range(300)]
    assert scenes[:5] != [world.scene(8, index) for index in range(5)]
    assert not any(world.is_held_out(scene.traits) for scene in scenes)
    assert all(world.is_held_out(world.scene(7, index, 'held_out').traits) for index in range(50))


def test_turns_are_random_and_leave_the_first_third_alone():
    scenes = [GPU.scene(0, index) for index in range(900)]
    order = list(DIRECTIONS)
    first, second = np.array([[moment for moment, _ in scene.turns] for scene in scenes]).T
    assert first.min() >= 1 / 3 and first.max() <= 1 / 2 and second.min() >= 2 / 3 and second.max() <= 5 / 6
    headings = [[scene.traits.direction, *(heading for _, heading in scene.turns)] for scene in scenes]
    changes = [(order.index(b) - order.index(a)) % 4 for way in headings for a, b in itertools.pairwise(way)]
    counts = np.bincount(changes, minlength=4)
    assert counts[2] == 0  # nothing reverses
    assert np.abs(counts[[0, 1, 3]] / len(changes) - 1 / 3).max() < 0.04
    assert all(not CPU.scene(0, index).turns for index in range(20))


@BOTH
@pytest.mark.parametrize(('frames', 'size'), [(17, (64, 64)), (33, (96, 64)), (1, (32, 64))])
def test_shape_is_where_the_track_says_and_as_large_as_its_size(world, frames, size):
    height, width = size
    for index in range(60):
        scene = world.scene(1, index)
        clip, centers = draw(scene, frames, *size), track(scene, frames, *size)
        assert clip.shape == (frames, *size, 3) and clip.dtype == np.uint8
        share = alpha_of(clip, scene.traits)
        area = share.sum(axis=(1, 2))
        # Its outline may touch the border, never cross it: the whole area is there.
        np.testing.assert_allclose(area, math.pi * (SIZES[scene.traits.size] * min(size)) ** 2, rtol=0.04)
        x = (share.sum(axis=1) * (np.arange(width) + 0.5)).sum(axis=1) / area
        y = (share.sum(axis=2) * (np.arange(height) + 0.5)).sum(axis=1) / area
        np.testing.assert_allclose(np.stack([x, y], axis=1), centers, atol=0.12)


@BOTH
def test_way_is_that_of_the_speed_at_any_length_and_size(world):
    for index in range(40):
        scene = world.scene(2, index)
        for frames, side in ((9, 32), (49, 320)):
            steps = np.diff(track(scene, frames, side, side), axis=0)
            # The path length is measured along the axes, so that a turn within a step does not shorten it.
            assert np.abs(steps).sum() == pytest.approx(SPEEDS[scene.traits.speed] * side, rel=1e-4)
            first = steps[: math.floor((frames - 1) * world.steady)]
            np.testing.assert_allclose(
                first / np.linalg.norm(first, axis=1, keepdims=True), [DIRECTIONS[scene.traits.direction]] * len(first),
                atol=2e-3,
            )  # fmt: skip


def test_a_larger_picture_is_the_same_picture():
    """Drawing at four times the size and averaging gives the small picture: it is antialiased."""
    for shape in REACHES:
        scene = Scene(RED_CIRCLE._replace(shape=shape), (0.3, 0.7))
        large = draw(scene, 3, 256, 256).reshape(3, 64, 4, 64, 4, 3).mean(axis=(2, 4))
        assert np.abs(draw(scene, 3, 64, 64) - large).mean() < 0.25
        assert np.abs(draw(scene, 3, 64, 64) - large).max() < 50  # at a corner


@pytest.mark.parametrize('split', ['train', 'held_out'])
def test_wording_tells_nothing_of_the_scene(split):
    """Otherwise a model would learn to read the color from a wording such as "little"."""
    source = MovingShapesSource(CPU, 1, (16, 16), seed=1, count=2000, split=split, paraphrase=True)
    captions = [source.caption(index) for index in range(len(source))]
    numbers = np.array([CPU.numbers(source.scene(index).traits) for index in range(len(source))])
    places = np.array([source.scene(index).start for index in range(len(source))])
    for word in ('little', 'goes', 'against'):
        said = np.array([word in text for text in captions])
        assert 0.45 < said.mean() < 0.55
        for column in (*numbers.T, *places.T):
            if column.std():
                assert abs(np.corrcoef(said, column)[0, 1]) < 0.1, word


def test_source_feeds_the_loader():
    source = MovingShapesSource(GPU, 9, (32, 64), seed=5, count=20)
    sample = source[3]
    assert sample['prompt'] == caption(source.scene(3).traits)
    assert GPU.combinations('all')[sample['combination']] == source.scene(3).traits
    words = tuple(words[i] for words, i in zip(GPU.values, sample['attributes'], strict=True))
    assert words == source.scene(3).traits
    sharding = batch_sharding(make_mesh(MeshConfig(data=-1, fsdp=1)))
    loader = Loader(source, sharding, batch_size=jax.device_count())
    batch = next(loader)
    loader.close()
    assert batch['video'].shape == (jax.device_count(), 9, 32, 64, 3) and batch['video'].dtype == np.uint8
    assert 'prompt' not in batch
    with pytest.raises(IndexError):
        source[20]
    # A source reads as a sequence, which ends.
    assert len(list(MovingShapesSource(CPU, 1, (32, 32), count=3))) == 3


def test_source_tells_what_it_gives():
    make = lambda **changes: MovingShapesSource(CPU, 9, (32, 32), **changes).metadata()
    assert json.loads(json.dumps(make())) == make()
    assert make() != make(seed=1) and make() != make(split='held_out') and make() != make(paraphrase=True)
    plain, other = MovingShapesSource(CPU, 9, (32, 32)), MovingShapesSource(CPU, 9, (32, 32), paraphrase=True)
    assert [parse(other.caption(index)) for index in range(30)] == [parse(plain.caption(index)) for index in range(30)]
    assert sum(other.caption(index) != plain.caption(index) for index in range(30)) > 20


def test_dataset_resumes_and_tfds_reads_it(tmp_path, monkeypatch):
    command = ['--count', '10', '--frames', '9', '--height', '64', '--width', '64', '--samples-per-shard', '4']
    whole = ['--out', str(tmp_path / 'whole'), '--preview', str(tmp_path / 'rows.png')]
    assert moving_shapes.main([*command, *whole]) == 0
    # Stopped at the sixth clip, and started again.
    source = MovingShapesSource(CPU, 9, (64, 64), count=10)
    getitem = MovingShapesSource.__getitem__

    def interrupted(self, index):
        if index == 5:
            raise KeyboardInterrupt
        return getitem(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(MovingShapesSource, '__getitem__', interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_samples(source, tmp_path / 'stopped', 4)
    drawn = []
    monkeypatch.setattr(MovingShapesSource, '__getitem__', lambda self, i: drawn.append(i) or getitem(self, i))
    assert moving_shapes.main([*command, '--out', str(tmp_path / 'stopped')]) == 0
    assert drawn == list(range(5, 10))
    manifests = [json.loads((tmp_path / name / 'manifest.json').read_text()) for name in ('whole', 'stopped')]
    assert manifests[0] == manifests[1] and manifests[0]['complete']

    records = tfds.builder_from_directory(tmp_path / 'stopped').as_data_source('train')
    samples = SampleSource(tmp_path / 'stopped', verify=True)
    assert len(records) == len(samples) == 10
    for index in range(10):
        want, sample = getitem(source, index), samples[index]
        assert records[index]['prompt'].decode() == sample['prompt'] == want['prompt']
        assert records[index]['index'] == sample['index'] == index
        for name in ('video', 'attributes', 'combination', 'track'):
            np.testing.assert_array_equal(records[index][name], want[name])
            np.testing.assert_array_equal(sample[name], want[name])
    with Image.open(tmp_path / 'rows.png') as image:
        assert image.height > 10 * 96


def test_folder_of_videos(tmp_path, capsys):
    command = ['--count', '3', '--frames', '9', '--height', '64', '--width', '64', '--videos', '--out', str(tmp_path)]
    assert moving_shapes.main(command) == 0
    with (tmp_path / 'captions.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    source = MovingShapesSource(CPU, 9, (64, 64), count=3)
    for index, row in enumerate(rows):
        traits = source.scene(index).traits
        assert row['caption'] == caption(traits) and Traits(*(row[name] for name in Traits._fields)) == traits
        clip = read_mp4(tmp_path / row['file'])
        assert clip.shape == (9, 64, 64, 3)
        assert np.abs(clip.astype(int) - source[index]['video']).mean() < 6  # what the codec loses
    # A second run writes only the missing files.
    (tmp_path / '000001.mp4').unlink()
    before = (tmp_path / '000000.mp4').stat().st_mtime_ns
    assert moving_shapes.main(command) == 0
    assert (tmp_path / '000001.mp4').exists() and (tmp_path / '000000.mp4').stat().st_mtime_ns == before
    assert moving_shapes.main([*command, '--seed', '1']) == 2
    assert 'was written with other settings' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('option', 'value', 'message'),
    [
        ('--frames', '16', '16 frames; use 8 n [+] 1'),
        ('--height', '40', 'height 40 is not a positive multiple of 64; use 64'),
        ('--width', '0', 'width 0 is not a positive multiple of 64; use 64'),
        # The autoencoder takes it, but no denoiser.
        ('--height', '96', 'height 96 is not a positive multiple of 64; use 128'),
        ('--count', '0', 'count is 0; give at least 1'),
        ('--seed', '-1', '--seed is -1'),
    ],
)
def test_bad_options(tmp_path, capsys, option, value, message):
    assert moving_shapes.main(['--out', str(tmp_path), option, value]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    assert re.search(message, error)


def test_bad_worlds():
    with pytest.raises(InputError, match=r"no color is called 'rad'. Did you mean \"red\"\?"):
        dataclasses.replace(CPU, colors=('rad',))
    with pytest.raises(InputError, match='blue is a color of shapes and of backgrounds'):
        dataclasses.replace(CPU, colors=('red', 'blue'))
    with pytest.raises(InputError, match='shape has 2 values, some equal'):
        dataclasses.replace(CPU, shapes=('circle', 'circle'))
    with pytest.raises(InputError, match='turns is -1'):
        dataclasses.replace(CPU, turns=-1)
    with pytest.raises(InputError, match="split is 'test'; use one of train, held_out, all"):
        MovingShapesSource(CPU, 9, (32, 32), split='test')
    with pytest.raises(InputError, match="color 'cyan' does not occur in this world"):
        CPU.numbers(RED_CIRCLE._replace(color='cyan'))
    with pytest.raises(InputError, match='0 frames of 32x32'):
        draw(Scene(RED_CIRCLE), 0, 32, 32)
