"""Tests of the Python interface: load, generate, save, and display in a notebook."""

from __future__ import annotations

import dataclasses
import inspect
import io
import subprocess
import sys
import typing

import jax
import numpy as np
import pytest
from PIL import Image

import neodragon_jax as nd
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import crop_center, read_mp4
from neodragon_jax.generation.options import ModelOptions
from support.goldens import ROOT, TINY_CHECKPOINT
from support.sessions import plain_clip

SIZE = {'frames': 9, 'height': 64, 'width': 128}


@pytest.fixture(scope='module')
def system() -> nd.System:
    return nd.load(TINY_CHECKPOINT)


@pytest.fixture(scope='module')
def video(system) -> nd.Video:
    return system.generate('a cat', **SIZE)


def test_a_video_is_that_of_the_command_line(system, video):
    np.testing.assert_array_equal(video.frames, plain_clip())
    assert (video.prompt, video.seed, video.number, video.fps, video.refused) == ('a cat', 0, 0, 24, False)
    assert not system.checks_safety and 'no safety checker' in repr(system) and 'hybrid' in repr(system)
    assert 'a cat' in repr(video) and 'frames' not in repr(video)


def test_a_batch_with_progress(system, video):
    told: list[nd.Progress] = []
    videos = system.generate(['a cat', 'a dog'], seed=0, progress=told.append, **SIZE)
    np.testing.assert_array_equal(videos[0].frames, video.frames)
    assert np.any(videos[1].frames != video.frames) and videos[1].prompt == 'a dog'
    assert [report.done for report in told] == list(range(1, told[0].total + 1))
    assert [report.phase for report in told[:5]] == ['first frame'] * 4 + ['denoising']
    assert told[-1].phase == 'decoding'


def test_repeated_prompts_of_a_batch_are_further_samples(system, video):
    one, two = system.generate(['a cat', 'a cat'], **SIZE)
    np.testing.assert_array_equal(one.frames, video.frames)
    assert (one.number, two.number) == (0, 1) and np.any(one.frames != two.frames)


@pytest.mark.long
def test_a_sample_depends_on_seed_and_number_not_on_the_devices(video):
    system = nd.load(TINY_CHECKPOINT, devices=jax.devices()[:2])
    (same,) = system.stream(['a cat'], options=nd.VideoOptions(**SIZE))
    assert np.abs(same.frames.astype(int) - video.frames.astype(int)).max() <= 1
    other = system.generate('a cat', seed=1, **SIZE), system.generate('a cat', number=1, **SIZE)
    assert all(np.abs(one.frames.astype(int) - video.frames.astype(int)).max() > 8 for one in other)


def test_first_frame_from_an_array_and_from_a_file(system, tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / 'picture.png')
    one, two = (system.generate('a cat', image=image, **SIZE) for image in (picture, tmp_path / 'picture.png'))
    np.testing.assert_array_equal(one.frames, two.frames)


def test_save_and_contact_sheet(video, tmp_path):
    assert read_mp4(video.save(tmp_path / 'new' / 'a.mp4')).shape == video.frames.shape == (9, 64, 128, 3)
    for name in ('a.gif', 'a'):
        with pytest.raises(nd.InputError, match=r'give a name that ends in \.mp4'):
            video.save(tmp_path / name)
    sheet = video.contact_sheet(columns=3, tiles=6)
    shown = Image.open(io.BytesIO(video._repr_png_()))
    assert sheet.width < shown.width and shown.format == 'PNG'
    html = video._repr_html_()
    assert html.startswith('<figure><video') and 'data:video/mp4;base64,' in html and 'a cat, seed 0' in html


def test_prompts_beyond_the_token_limit_are_found(system):
    limit, cut = system.cut_prompts(['a cat', 'word ' * 300])
    assert (limit, cut) == (128, ['word ' * 300])
    # A prompt that fits alone is cut with a long modifier.
    assert system.cut_prompts(['a cat'], ' and more' * 100)[1] == ['a cat']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'seed': -1}, '--seed is -1'),
        ({'seed': 2**32}, 'from 0 to 4294967295'),
        ({'guidance': float('nan')}, '--guidance is nan'),
        ({'first_guidance': float('inf')}, '--first-guidance is inf'),
        ({'guidance': -1.0}, '--guidance is -1.0'),
        ({'frames': 10}, '10 frames'),
        ({'height': 65}, 'height 65'),
        ({'steps': (1, 0, 1)}, 'steps is 1 0 1'),
        *(({'seed': value}, f'--seed is {value!r}; give a whole number') for value in (0.5, '0', True)),
        ({'seed': None}, '--seed is None'),
        *(({'number': value}, f'number is {value!r}; give a whole number from 0') for value in (-1, 2**32, 1.5, True)),
        *(({'frames': value}, f'--frames is {value!r}; give a whole number') for value in ('17', 17.0, True)),
        ({'height': 64.0}, '--height is 64.0; give a whole'),
        *(({'steps': value}, '--steps is .*; give 3 whole numbers') for value in (1, (1, 1), (), '111')),
        ({'first_steps': (1.0, 1, 1)}, '--first-steps is 1.0; give a whole number'),
        *(({'guidance': value}, f'--guidance is {value!r}; give a number') for value in ('2', True)),
        ({'first_frame': 'nope'}, "--first-frame 'nope' is unknown. Use model or denoiser"),
        ({'image': [[0]]}, '--image is of type list; give a file or RGB bytes'),
        ({'image': Image.new('RGB', (8, 8))}, r"--image is of type Image; .*numpy.asarray\(image.convert\('RGB'\)\)"),
        ({'prompt_modifier': 3}, '--prompt-modifier is of type int; give a text'),
        ({'negative_prompt': b'x'}, '--negative-prompt is of type bytes'),
        ({'prompt_modifier': '\udcff'}, r"--prompt-modifier '\\udcff' is not valid UTF-8"),
        ({'image': 'nowhere.png'}, 'nowhere.png'),
        ({'image': np.zeros((8, 8), np.uint8)}, 'image: got uint8'),
        ({'image': 'x.png', 'first_frame': 'model'}, 'both set the first frame; pass one.'),
    ],
)
def test_bad_options_are_refused_before_the_work(system, options, message):
    with pytest.raises(nd.InputError, match=message) as error:
        system.generate('a cat', **(SIZE | options))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('prompt', 'message'),
    [
        (None, 'prompts is of type NoneType; give a list of texts'),
        (b'a cat', 'prompts is of type bytes'),
        (['a cat', None], r'prompts\[1\] is of type NoneType; give a text'),
        ('\udcff', r"prompts\[0\] '\\udcff' is not valid UTF-8"),
        (['a cat', ' '], r"prompts\[1\] ' ': text is empty; correct it"),
        ('', r"prompts\[0\] '': text is empty"),
    ],
)
def test_bad_prompts_are_refused_before_the_work(system, prompt, message):
    with pytest.raises(nd.InputError, match=message):
        system.generate(prompt, **SIZE)


@pytest.mark.parametrize('prompt', [' a cat\n', 'a\n  cat', '\ufeffa\tcat'])
def test_a_prompt_gives_the_video_that_the_command_line_makes_of_it(system, video, prompt):
    """As in files and on the command line, white space does not count; noise depends on the prompt."""
    same = system.generate(prompt, **SIZE)
    np.testing.assert_array_equal(same.frames, video.frames)
    assert same.prompt == 'a cat'


def test_numbers_and_lists_of_numpy_are_taken(system, video):
    size = {name: np.int64(value) for name, value in SIZE.items()}
    same = system.generate('a cat', seed=np.uint32(0), number=np.int64(0), steps=np.array([1, 1, 1]), **size)
    np.testing.assert_array_equal(same.frames, video.frames)
    assert type(same.seed) is int and nd.VideoOptions(guidance=np.float32(2)).guidance == 2.0


@pytest.mark.parametrize('name', ['safety_checker', 'dtype', 'low_memory', 'profile', 'noise'])
def test_none_is_no_value_of_an_option_with_another_default(name):
    """None would switch the safety checker off, and compute in float64."""
    kind = nd.VideoOptions if name == 'noise' else ModelOptions
    with pytest.raises(InputError, match=f'--{name.replace("_", "-")}.* None'):
        kind(**{name: None})


def test_every_prompt_of_a_batch_has_a_number(system):
    with pytest.raises(InputError, match='numbers has 1 entries for 2 prompts'):
        next(system.stream(['a cat', 'a dog'], numbers=[0], options=nd.VideoOptions(**SIZE)))


def test_bad_model_options():
    for options in ({'checkpoint': 3}, {'student': b'x'}, {'upscale': 1}, {'low_memory': 'no'}, {'profile': 1}):
        with pytest.raises(nd.InputError, match=f'--{next(iter(options)).replace("_", "-")} is .*; give'):
            nd.load(**({'checkpoint': TINY_CHECKPOINT} | options))
    with pytest.raises(nd.InputError, match='devices is empty'):
        nd.load(TINY_CHECKPOINT, devices=[])
    with pytest.raises(nd.InputError, match=r"dtype 'float16' is unknown"):
        nd.load(TINY_CHECKPOINT, dtype='float16')
    with pytest.raises(nd.InputError, match="mode 'hybird' is unknown"):
        nd.load(TINY_CHECKPOINT, mode='hybird')


def test_importing_is_fast():
    """JAX is imported only when the interface is first used."""
    code = 'import sys, neodragon_jax as nd; dir(nd); print([name for name in ("jax", "numpy") if name in sys.modules])'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == '[]'
    with pytest.raises(AttributeError, match='no attribute'):
        nd.nothing  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_pictures_are_cropped_not_squashed():
    """A disc in a portrait picture stays a disc."""
    tall = np.zeros((200, 100, 3), np.uint8)
    tall[75:125] = 255
    assert crop_center(tall, 64, 128).shape == (50, 100, 3) and (crop_center(tall, 64, 128) == 255).all()
    assert crop_center(tall.swapaxes(0, 1), 64, 64).shape == (100, 100, 3)
    assert crop_center(tall, 200, 100) is not None and np.array_equal(crop_center(tall, 400, 200), tall)


def test_portable_noise_comes_from_seed_plus_number(system, video):
    options = nd.VideoOptions(noise='portable', **SIZE)
    (one,) = system.stream(['a cat'], numbers=[1], seed=0, options=options)
    (two,) = system.stream(['a cat'], numbers=[0], seed=1, options=options)
    np.testing.assert_array_equal(one.frames, two.frames)
    assert np.abs(one.frames.astype(int) - video.frames.astype(int)).max() > 8
    np.testing.assert_array_equal(system.generate('a cat', seed=1, noise='portable', **SIZE).frames, two.frames)


def test_generate_takes_every_option_of_a_video(system):
    """With the default of the options, and in each form of the call that a type checker knows."""
    for call in (nd.System.generate, *typing.get_overloads(nd.System.generate)):
        parameters = inspect.signature(call).parameters
        assert {field.name for field in dataclasses.fields(nd.VideoOptions)} <= set(parameters)
    for field in dataclasses.fields(nd.VideoOptions):
        assert inspect.signature(nd.System.generate).parameters[field.name].default == field.default
    with pytest.raises(nd.InputError, match=r"--noise 'portble' is unknown\."):
        system.generate('a cat', noise='portble', **SIZE)
