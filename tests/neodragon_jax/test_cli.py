"""Tests of the command line: files that it writes and skips, and errors in one line."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from neodragon_jax.__main__ import find_prompts, main, parse_options
from neodragon_jax.base.video import read_mp4
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import shipped
from neodragon_jax.checkpoint.abstract import example_inputs
from neodragon_jax.config.super_resolution import variant
from neodragon_jax.generation import pipeline
from neodragon_jax.generation.jobs import video_name
from neodragon_jax.generation.plan import make_plan
from neodragon_jax.generation.tokens import DEFAULT_MODIFIER
from neodragon_jax.models.super_resolution import QuickSRNet
from neodragon_jax.pyramid.sampler import DrawnNoise
from support.goldens import TINY_CHECKPOINT
from support.sessions import command, open_command


@pytest.fixture
def picture(tmp_path) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 150, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'picture.png')
    return str(tmp_path / 'picture.png')


@pytest.mark.long
def test_videos_of_a_prompts_file(tmp_path, picture, capsys):
    out = tmp_path / 'videos'
    (tmp_path / 'prompts.txt').write_text('a cat\n\na dog / a bird\na cat\n')
    more = ['--image', picture, '--prompts-file', str(tmp_path / 'prompts.txt'), '--num-samples', '2']
    assert main(command(out, *more)) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        f'{name}-{i}.{end}' for name in ('a cat', 'a dog _ a bird~9183f456') for i in (0, 1) for end in ('mp4', 'png')
    }
    clips = {name: read_mp4(out / name) for name in names if name.endswith('mp4')}
    assert {clip.shape for clip in clips.values()} == {(9, 64, 128, 3)}
    assert np.abs(clips['a cat-0.mp4'].astype(int) - clips['a cat-1.mp4'].astype(int)).max() > 8
    assert '3 denoiser calls each' in capsys.readouterr().out

    (out / 'a cat-1.mp4').unlink()
    kept = (out / 'a cat-0.mp4').stat().st_mtime_ns
    assert main(command(out, *more)) == 0
    assert 'exist already' in capsys.readouterr().out
    assert (out / 'a cat-0.mp4').stat().st_mtime_ns == kept
    # Generated on one device now and on four before: floats differ in the last place, and the video codec amplifies
    # that. The difference to another seed is a hundred times larger.
    again = read_mp4(out / 'a cat-1.mp4')
    assert mean_difference(again, clips['a cat-1.mp4']) < 0.1 * mean_difference(again, clips['a cat-0.mp4'])


def mean_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean absolute difference of two clips, in 1/255."""
    return float(np.abs(first.astype(int) - second.astype(int)).mean())


def test_monolithic_with_guidance_and_steps(tmp_path):
    more = ['--mode', 'monolithic', '--prompt', 'a cat', '--steps', '1', '2', '1', '--guidance', '3']
    assert main(command(tmp_path, *more)) == 0
    assert read_mp4(tmp_path / 'a cat-0.mp4').shape == (9, 64, 128, 3)


@pytest.mark.long
def test_first_frame_is_drawn_from_the_prompt(tmp_path):
    assert main(command(tmp_path, '--prompt', 'a cat', '--prompt', 'a dog')) == 0
    cat, dog = (read_mp4(tmp_path / f'a {animal}-0.mp4')[0].astype(int) for animal in ('cat', 'dog'))
    assert np.abs(cat - dog).max() > 8


@pytest.mark.long
def test_first_frame_by_the_denoiser(tmp_path, capsys):
    """The few-step denoiser also generates unit 0; the video equals that of the library's functions."""
    argv = command(tmp_path, '--prompt', 'a cat', '--first-frame', 'denoiser')
    assert main(argv) == 0
    # Two units of three stages.
    assert '6 denoiser calls each' in capsys.readouterr().out
    assert read_mp4(tmp_path / 'a cat-0.mp4').shape == (9, 64, 128, 3)
    worker, told = open_command(argv), []
    (clip,) = worker.make(['a cat'], [0], told.append)
    assert told == ['denoising'] * 6 + ['decoding'] * 2 and len(told) == worker.steps

    parts = pipeline.load(TINY_CHECKPOINT, 'hybrid', dtype=np.float32)
    plan = parts.check(make_plan('hybrid', 9, 64, 128))
    noise = DrawnNoise(pipeline.sample_keys(0, ['a cat'], [0]))
    (want,) = pipeline.generate(parts, plan, ['a cat' + DEFAULT_MODIFIER], noise)
    np.testing.assert_array_equal(clip.frames, want)


@pytest.fixture
def shapes(tmp_path, monkeypatch) -> pathlib.Path:
    """The miniature as the shipped checkpoint, without a first-frame model, in an empty current directory."""
    monkeypatch.setattr(shipped, 'FOLDER', tmp_path / 'checkpoints')
    root = tmp_path / 'checkpoints' / shipped.DEFAULT
    shutil.copytree(TINY_CHECKPOINT, root, ignore=shutil.ignore_patterns('ssd_1b_*'))
    monkeypatch.chdir(tmp_path)
    return root


def describe(root: pathlib.Path, **values: object) -> None:
    """Write the generation.json of a checkpoint."""
    (root / 'generation.json').write_text(json.dumps(values))


def test_nothing_but_a_prompt(shapes, capsys):
    size = {'frames': 17, 'height': 64, 'width': 64, 'prompt_modifier': ''}
    monolithic = {'steps': [1, 2, 1], 'first_steps': [2, 2, 2], 'guidance': 2.0}
    modes = {'hybrid': {'first_frame': 'denoiser'}, 'monolithic': monolithic}
    describe(shapes, **size, modes=modes, prompts='captions of shapes', example='a red circle')
    assert 'Use --prompt "a red circle"' in refusal(capsys, [])
    assert main(['--prompt', 'a cat']) == 0
    said = capsys.readouterr().out
    assert 'Using the shipped checkpoint moving_shapes, trained on captions of shapes. --checkpoint takes' in said
    assert '1 videos of 17x64x64, 9 denoiser calls each' in said
    assert read_mp4('out/videos/a cat-0.mp4').shape == (17, 64, 64, 3)

    # By name, in the other mode, with options that override: a guided step is two calls.
    argv = ['--checkpoint', 'moving_shapes', '--mode', 'monolithic', '--frames', '9', '--prompt', 'x']
    worker = open_command(argv)
    assert worker.size == (9, 64, 64) and worker.calls == 2 * (6 + 4)
    assert worker.settings.modifier == '' and worker.plan.first_guidance == 2.0
    told = open_command([*argv, '--prompt-modifier', '!', '--steps', '3', '3', '3'])
    assert told.settings.modifier == '!' and told.plan.steps == told.plan.first_steps == (3, 3, 3)
    assert 'Using the shipped' not in capsys.readouterr().out


def test_a_checkpoint_without_a_first_frame_model(shapes, capsys, picture):
    more = ['--frames', '9', '--height', '64', '--width', '128', '--prompt', 'a cat']
    message = refusal(capsys, more)
    assert 'no first-frame model' in message and '--first-frame denoiser' in message and '--image' in message
    describe(shapes, modes={'hybrid': {'first_frame': 'denoiser'}})
    assert 'no first-frame model' in refusal(capsys, [*more, '--first-frame', 'model'])
    # A picture overrides the file: unit 0 is given.
    worker = open_command([*more, '--image', picture])
    assert (worker.first_unit, worker.calls) == (1, 3)
    describe(shapes, frame=9)
    assert 'generation.json: unknown key "frame". Did you mean "frames"?' in refusal(capsys, more)


def test_upscaled_frames_are_larger(tmp_path):
    network = QuickSRNet(variant('small'))
    params = jax.jit(network.init)(jax.random.key(0), *example_inputs(network))['params']
    checkpoint.save(tmp_path / 'network', network, params)
    more = ['--mode', 'monolithic', '--prompt', 'x', '--steps', '1', '1', '1', '--upscale', str(tmp_path / 'network')]
    assert main(command(tmp_path, *more)) == 0
    assert read_mp4(tmp_path / 'x-0.mp4').shape == (9, 128, 256, 3)


def refusal(capsys, argv: list[str]) -> str:
    """Return the one-line error of the program."""
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith('error: ') and '\n' not in error
    return error


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--mode', 'monolithic'], 'no prompt given'),
        (['--mode', 'monolithic', '--prompts-file', 'nowhere.txt'], 'nowhere.txt'),
        (['--prompt', 'x', '--image', 'nowhere.png'], 'nowhere.png'),
        (
            ['--prompt', 'x', '--image', 'nowhere.png', '--first-frame', 'denoiser'],
            '--image nowhere.png and --first-frame both set',
        ),
        (
            ['--prompt', 'x', '--mode', 'monolithic', '--first-frame', 'model'],
            '--first-frame model is for --mode hybrid',
        ),
        (['--prompt', 'x', '--mode', 'monolithic', '--frames', '10'], '10 frames'),
        (['--prompt', 'x', '--mode', 'monolithic', '--height', '65'], 'height 65'),
        (['--prompt', 'x', '--mode', 'monolithic', '--steps', '1', '0', '1'], 'steps is 1 0 1'),
        (['--prompt', 'x', '--mode', 'monolithic', '--num-samples', '0'], '--num-samples'),
        (['--prompt', 'x', '--prompt-modifier', '\udcff'], 'is not valid UTF-8'),
        (['--prompt', 'x', '--negative-prompt', '\udcff'], 'is not valid UTF-8'),
        (['--prompt', 'x', '--student', 'nowhere'], 'nowhere'),
        (['--prompt', 'x', '--mode', 'monolithic', '--student', 'nowhere'], '--student is for hybrid mode'),
        (['--prompt', 'x', '--mode', 'monolithic', '--upscale', 'nowhere'], 'nowhere'),
    ],
)
def test_bad_options_in_one_line(tmp_path, capsys, more, message):
    assert message in refusal(capsys, command(tmp_path / 'out', *more))
    assert not list(tmp_path.rglob('*.mp4'))


@pytest.mark.parametrize('text', ['', ' ', '\ufeff', 'caf\udce9', 'a\0cat'])
def test_prompts_that_a_file_refuses_are_refused(tmp_path, capsys, text):
    assert '--prompt ' in refusal(capsys, command(tmp_path / 'out', '--mode', 'monolithic', '--prompt', text))
    assert not list(tmp_path.rglob('*.mp4'))


def test_prompts_are_cleaned_as_in_files(tmp_path):
    texts = ['\ufeffa  cat', ' a cat\n', 'cafe\u0301']
    (tmp_path / 'p.json').write_text(json.dumps(texts))
    typed = parse_options(command(tmp_path, *(option for text in texts for option in ('--prompt', text))))
    listed = parse_options(command(tmp_path, '--prompts-file', str(tmp_path / 'p.json')))
    assert find_prompts(typed) == find_prompts(listed) == ['a cat', 'café']


def test_empty_prompts_file(tmp_path, capsys):
    (tmp_path / 'empty.txt').write_text('\n \n')
    more = ['--mode', 'monolithic', '--prompts-file', str(tmp_path / 'empty.txt')]
    assert 'empty.txt: empty' in refusal(capsys, command(tmp_path / 'out', *more))


def test_missing_and_truncated_checkpoints(tmp_path, capsys):
    more = ['--mode', 'monolithic', '--prompt', 'x']
    assert 'no such checkpoint' in refusal(capsys, command(tmp_path / 'out', *more, root=tmp_path / 'nowhere'))
    copy = pathlib.Path(shutil.copytree(TINY_CHECKPOINT, tmp_path / 'copy'))
    weights = copy / 'diffusion_transformer_320p_multistep_t2v' / 'diffusion_pytorch_model.safetensors'
    weights.write_bytes(weights.read_bytes()[:5000])
    assert 'truncated' in refusal(capsys, command(tmp_path / 'out', *more, root=copy))
    shutil.rmtree(copy / 'tokenizer')
    assert not list(tmp_path.rglob('*.mp4'))


def test_a_kill_while_writing_leaves_no_video(tmp_path, monkeypatch, capsys):
    import neodragon_jax.base.video as video

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(video, '_video_frames', die)
    argv = command(tmp_path, '--mode', 'monolithic', '--prompt', 'x', '--steps', '1', '1', '1')
    assert main(argv) == 130
    assert capsys.readouterr().err.strip().count('\n') == 0
    assert not list(tmp_path.glob('*.mp4')) and not list(tmp_path.glob('.*'))


def test_names_fit_the_file_system():
    assert video_name('a cat', 3) == 'a cat-3'
    long = video_name('é' * 400, 0)
    assert len(long.encode()) < 240 and long != video_name('é' * 399, 0)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['--help'])
    assert stop.value.code == 0
    said = ' '.join(capsys.readouterr().out.split())
    assert 'examples:' in said and 'An option always wins.' in said
    assert 'generation.json: 49' in said and 'default: moving_shapes' in said and 'default: out/videos' in said
