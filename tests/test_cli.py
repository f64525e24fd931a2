"""The command line: files it makes, what it skips, and how it refuses."""

from __future__ import annotations

import pathlib
import shutil

import jax
import numpy as np
import pytest
from conftest import TINY_CHECKPOINT
from PIL import Image

from neodragon_jax import checkpoint
from neodragon_jax.__main__ import main, video_name
from neodragon_jax.config_super_resolution import variant
from neodragon_jax.models.super_resolution import QuickSRNet
from neodragon_jax.video import read_mp4


@pytest.fixture
def picture(tmp_path) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 150, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'picture.png')
    return str(tmp_path / 'picture.png')


def command(out: pathlib.Path, *more: str, checkpoint: pathlib.Path = TINY_CHECKPOINT) -> list[str]:
    size = ['--height', '64', '--width', '128', '--frames', '9']
    return ['--checkpoint', str(checkpoint), '--out', str(out), *size, *more]


def test_videos_of_a_prompts_file(tmp_path, picture, capsys):
    out = tmp_path / 'videos'
    (tmp_path / 'prompts.txt').write_text('a cat\n\na dog / a bird\na cat\n')
    more = ['--image', picture, '--prompts-file', str(tmp_path / 'prompts.txt'), '--num-samples', '2']
    assert main(command(out, *more)) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        f'{name}-{i}.{end}' for name in ('a cat', 'a dog _ a bird') for i in (0, 1) for end in ('mp4', 'png')
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
    # Made on one device now and on four before: floats differ in the last place, and the video codec amplifies that.
    # Another seed differs a hundred times more.
    again = read_mp4(out / 'a cat-1.mp4')
    assert mean_difference(again, clips['a cat-1.mp4']) < 0.1 * mean_difference(again, clips['a cat-0.mp4'])


def mean_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean absolute difference of two clips, in 1/255."""
    return float(np.abs(first.astype(int) - second.astype(int)).mean())


def test_monolithic_with_guidance_and_steps(tmp_path):
    more = ['--mode', 'monolithic', '--prompt', 'a cat', '--steps', '1', '2', '1', '--guidance', '3']
    assert main(command(tmp_path, *more)) == 0
    assert read_mp4(tmp_path / 'a cat-0.mp4').shape == (9, 64, 128, 3)


def test_first_frame_is_drawn_from_the_prompt(tmp_path):
    assert main(command(tmp_path, '--prompt', 'a cat', '--prompt', 'a dog')) == 0
    cat, dog = (read_mp4(tmp_path / f'a {animal}-0.mp4')[0].astype(int) for animal in ('cat', 'dog'))
    assert np.abs(cat - dog).max() > 8


def test_upscaled_frames_are_larger(tmp_path):
    network = QuickSRNet(variant('small'))
    params = network.init(jax.random.key(0), *checkpoint.example_inputs(network))['params']
    checkpoint.save(tmp_path / 'network', network, params)
    more = ['--mode', 'monolithic', '--prompt', 'x', '--steps', '1', '1', '1', '--upscale', str(tmp_path / 'network')]
    assert main(command(tmp_path, *more)) == 0
    assert read_mp4(tmp_path / 'x-0.mp4').shape == (9, 128, 256, 3)


def refusal(capsys, argv: list[str]) -> str:
    """Return the one line that the program says when it refuses."""
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
        (['--prompt', 'x', '--mode', 'monolithic', '--frames', '10'], '10 frames'),
        (['--prompt', 'x', '--mode', 'monolithic', '--height', '65'], 'height 65'),
        (['--prompt', 'x', '--mode', 'monolithic', '--steps', '1', '0', '1'], 'steps is 1 0 1'),
        (['--prompt', 'x', '--mode', 'monolithic', '--num-samples', '0'], '--num-samples'),
        (['--prompt', 'x', '--mode', 'monolithic', '--student', 'nowhere'], 'nowhere'),
        (['--prompt', 'x', '--mode', 'monolithic', '--upscale', 'nowhere'], 'nowhere'),
    ],
)
def test_bad_options_in_one_line(tmp_path, capsys, more, message):
    assert message in refusal(capsys, command(tmp_path / 'out', *more))
    assert not list(tmp_path.rglob('*.mp4'))


def test_empty_prompts_file(tmp_path, capsys):
    (tmp_path / 'empty.txt').write_text('\n \n')
    more = ['--mode', 'monolithic', '--prompts-file', str(tmp_path / 'empty.txt')]
    assert 'empty.txt: empty' in refusal(capsys, command(tmp_path / 'out', *more))


def test_missing_and_truncated_checkpoints(tmp_path, capsys):
    more = ['--mode', 'monolithic', '--prompt', 'x']
    assert 'no such checkpoint' in refusal(capsys, command(tmp_path / 'out', *more, checkpoint=tmp_path / 'nowhere'))
    copy = pathlib.Path(shutil.copytree(TINY_CHECKPOINT, tmp_path / 'copy'))
    weights = copy / 'diffusion_transformer_320p_multistep_t2v' / 'diffusion_pytorch_model.safetensors'
    weights.write_bytes(weights.read_bytes()[:5000])
    assert 'truncated' in refusal(capsys, command(tmp_path / 'out', *more, checkpoint=copy))
    shutil.rmtree(copy / 'tokenizer')
    assert not list(tmp_path.rglob('*.mp4'))


def test_a_kill_while_writing_leaves_no_video(tmp_path, monkeypatch):
    import neodragon_jax.video as video

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(video, '_video_frames', die)
    with pytest.raises(KeyboardInterrupt):
        main(command(tmp_path, '--mode', 'monolithic', '--prompt', 'x', '--steps', '1', '1', '1'))
    assert not list(tmp_path.glob('*.mp4')) and not list(tmp_path.glob('.*'))


def test_names_fit_the_file_system():
    assert video_name('a cat', 3) == 'a cat-3'
    long = video_name('é' * 400, 0)
    assert len(long.encode()) < 240 and long != video_name('é' * 399, 0)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['--help'])
    assert stop.value.code == 0
    assert 'examples:' in capsys.readouterr().out
