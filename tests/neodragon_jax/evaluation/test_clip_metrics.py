"""Tests of the metrics on synthetic clips with known results, and of the command that prints them."""

from __future__ import annotations

import json
import stat
import sys
import venv

import numpy as np
import pytest

from neodragon_jax import __main__ as cli
from neodragon_jax import evaluate
from neodragon_jax.base import video
from neodragon_jax.base.errors import InputError
from neodragon_jax.evaluation import clip_metrics as metrics
from neodragon_jax.evaluation import vbench
from neodragon_jax.generation.jobs import make_jobs

FRAMES, HEIGHT, WIDTH = 6, 64, 96


def gray(luma: np.ndarray) -> np.ndarray:
    """Return luma [T, H, W] as an RGB clip."""
    return np.repeat(np.asarray(luma, np.uint8)[..., None], 3, axis=-1)


def texture(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def constant(value: float, frames: int = FRAMES) -> np.ndarray:
    return np.full((frames, HEIGHT, WIDTH), value)


def test_still_clip_neither_moves_nor_flickers():
    got = metrics.measure(np.repeat(texture(1, HEIGHT, WIDTH, 3), FRAMES, axis=0))
    assert got.motion == got.flicker == 0
    # Of three independent bytes: the mean has variance 256^2 / 36, and a pixel minus four neighbors 5/4 of it; the
    # largest is on average half the range above the smallest.
    assert got.sharpness == pytest.approx(256 / 6 * np.sqrt(5 / 4), rel=0.03)
    assert got.saturation == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(('dy', 'dx'), [(0, 3), (2, 0), (-4, 3), (8, -8)])
def test_motion_of_a_panning_picture(dy, dx):
    scene = texture(256, 256)
    clip = [scene[96 + dy * t :, 96 + dx * t :][:HEIGHT, :WIDTH] for t in range(FRAMES)]
    assert metrics.motion(np.stack(clip).astype(np.float32)) == pytest.approx(np.hypot(dy, dx))


def test_motion_of_a_square_is_its_share():
    """One of the 3 x 5 tracked squares moves, by 5 px; the squares that it covers do not."""
    luma, patch = texture(1, HEIGHT, WIDTH).repeat(2, axis=0), texture(16, 16, seed=1)
    top, left = metrics.REACH + 16, metrics.REACH + 32
    luma[0, top : top + 16, left : left + 16] = patch
    luma[1, top + 3 : top + 19, left + 4 : left + 20] = patch
    assert metrics.measure(gray(luma[[0, 1, 1]])).motion == pytest.approx(5 / 15 / 2)


def test_brightness_and_noise_are_no_motion():
    faint = texture(1, HEIGHT, WIDTH) // 2 + np.random.default_rng(1).integers(0, 2, (FRAMES, HEIGHT, WIDTH))
    assert metrics.motion(faint.astype(np.float32)) == 0
    assert metrics.motion(texture(FRAMES, HEIGHT, WIDTH).astype(np.float32)) == 0
    assert metrics.motion(constant(10.0) + 20 * np.arange(FRAMES)[:, None, None]) == 0


def test_flicker_is_the_amplitude_and_ignores_fades():
    signs = np.where(np.arange(FRAMES) % 2, 1, -1)[:, None, None]
    assert metrics.measure(gray(constant(100.0) + 12 * signs)).flicker == pytest.approx(12)
    assert metrics.measure(gray(constant(100.0) + 12 * np.arange(FRAMES)[:, None, None])).flicker == 0
    # Only in a quarter of the squares.
    local = constant(100.0)
    local[:, :32, :48] += 12 * signs
    assert metrics.measure(gray(local)).flicker == pytest.approx(3)


def test_sharpness_of_checkerboards_gradients_and_blur():
    rows, columns = np.indices((HEIGHT, WIDTH))
    board = np.where((rows + columns) % 2, 160, 100)[None].repeat(FRAMES, axis=0)
    # Each pixel differs from all its neighbors by 60.
    assert metrics.measure(gray(board)).sharpness == pytest.approx(60)
    assert metrics.measure(gray(np.broadcast_to(rows + 2 * columns, board.shape))).sharpness == 0
    noise = texture(1, HEIGHT, WIDTH).astype(np.float32)
    blurred = (noise + np.roll(noise, 1, axis=1)) / 2
    assert metrics.sharpness(blurred) < 0.8 * metrics.sharpness(noise)


def test_saturation_of_colors():
    for color, want in {(90, 90, 90): 0, (255, 0, 0): 1, (0, 255, 255): 1, (200, 149, 174): 0.2}.items():
        clip = np.broadcast_to(np.array(color, np.uint8), (FRAMES, HEIGHT, WIDTH, 3))
        assert metrics.measure(clip).saturation == pytest.approx(want)


@pytest.mark.parametrize(
    ('clip', 'message'),
    [
        (np.zeros((6, 64, 64, 3), np.float32), 'float32'),
        (np.zeros((6, 64, 64), np.uint8), 'uint8'),
        (np.zeros((2, 64, 64, 3), np.uint8), 'at least 3 of 32x32'),
        (np.zeros((6, 64, 30, 3), np.uint8), 'at least 3 of 32x32'),
    ],
)
def test_clips_that_cannot_be_measured_are_refused(clip, message):
    with pytest.raises(InputError, match=message):
        metrics.measure(clip)


def test_table():
    clips = {'a|b-0.mp4': metrics.ClipMetrics(1, 2, 3, 0.5), 'c-0.mp4': metrics.ClipMetrics(3, 4, 5, 0.7)}
    lines = metrics.markdown_table(clips).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.replace(r'\|', '/').strip('|').split('|')] for line in lines]
    assert cells[0][1:] == ['motion (px/frame)', 'flicker (levels)', 'sharpness (levels)', 'saturation (0..1)']
    assert cells[2] == ['a/b-0.mp4', '1.000', '2.000', '3.000', '0.500']
    assert cells[4] == ['**mean**', '2.000', '3.000', '4.000', '0.600']
    assert len(metrics.markdown_table({'c-0.mp4': clips['c-0.mp4']}).splitlines()) == 3


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two good clips, a contact sheet, and three files that cannot be measured."""
    videos = tmp_path / 'videos'
    videos.mkdir()
    scene = np.kron(texture(32, 40), np.ones((4, 4), np.uint8))
    panning = np.stack([scene[:HEIGHT, 4 * t : 4 * t + WIDTH] for t in range(FRAMES)])
    video.write_mp4(videos / 'a cat-0.mp4', gray(panning))
    video.write_mp4(videos / 'a cat-1.mp4', gray(panning[:1].repeat(FRAMES, axis=0)))
    (videos / 'a cat-0.png').write_bytes(b'a contact sheet')
    (videos / 'cut-0.mp4').write_bytes((videos / 'a cat-0.mp4').read_bytes()[:700])
    video.write_mp4(videos / 'short-0.mp4', gray(panning[:2]))
    video.write_mp4(videos / 'unnamed.mp4', gray(panning))
    return videos


def test_command_measures_and_lists(folder, tmp_path, capsys):
    assert evaluate.main([str(folder), '--json', str(tmp_path / 'numbers' / 'm.json')]) == 0
    report = json.loads((tmp_path / 'numbers' / 'm.json').read_text())
    out = capsys.readouterr().out
    assert set(report['clips']) == {'a cat-0.mp4', 'a cat-1.mp4'}
    assert report['clips']['a cat-0.mp4']['motion'] == pytest.approx(4, abs=0.2)
    assert report['clips']['a cat-1.mp4']['motion'] == 0
    for values in report['clips'].values():
        assert values['saturation'] < 0.02
    assert report['mean']['motion'] == pytest.approx(2, abs=0.1)
    assert set(report['unreadable']) == {'cut-0.mp4', 'short-0.mp4', 'unnamed.mp4'}
    assert 'at least 3' in report['unreadable']['short-0.mp4']
    assert out.count('not measured: ') == 3 and '| **mean**' in out


def test_a_folder_without_a_good_clip_is_a_failure(folder, tmp_path, capsys):
    for path in folder.glob('a cat*'):
        path.unlink()
    assert evaluate.main([str(folder), '--json', str(tmp_path / 'm.json')]) == 2
    said = capsys.readouterr()
    assert said.out.count('not measured: ') == 3 and 'none of its 3 videos could be measured' in said.err
    assert len(json.loads((tmp_path / 'm.json').read_text())['unreadable']) == 3


def test_vbench_without_any_result_is_a_failure(folder, tmp_path, capfd):
    arguments = ['--vbench', '/bin/false', '--vbench-out', str(tmp_path / 'scores'), '--vbench-dimensions', 'color']
    assert evaluate.main([str(folder), *arguments]) == 2
    assert '--vbench /bin/false: no result in any dimension' in capfd.readouterr().err


def test_numbers_never_replace_a_video(folder, capsys):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    video = next(path for path in before if path.suffix == '.mp4')
    assert evaluate.main([str(folder), '--json', str(video)]) == 2
    assert f'{video}: give a name that ends in .json' in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_as_the_file_of_the_numbers_is_refused_first(folder, tmp_path, capsys):
    assert evaluate.main([str(folder), '--json', str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert f'{tmp_path} is a folder; give the name of a file' in said.err and said.out == ''


def test_wrong_folders_are_refused(tmp_path, capsys):
    assert evaluate.main([str(tmp_path)]) == 2
    assert 'no .mp4 in it' in capsys.readouterr().err
    assert evaluate.main([str(tmp_path / 'none')]) == 2
    assert 'no such folder' in capsys.readouterr().err


def test_absent_vbench_is_one_line(folder, tmp_path, capsys):
    assert evaluate.main([str(folder), '--vbench', str(tmp_path / 'vbench')]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'pip install vbench' in error


# Accepts VBench's arguments, records them, and returns the number of videos as the score; one dimension fails.
PROGRAM = """#!{python}
import argparse, json, os, shutil, sys
parser = argparse.ArgumentParser()
parser.add_argument('action', choices=['evaluate'])
for name in ('--videos_path', '--dimension', '--mode', '--output_path'):
    parser.add_argument(name, required=True)
args = parser.parse_args()
assert shutil.which('python').startswith({environment!r})
names = sorted(os.listdir(args.videos_path))
assert all(os.path.getsize(os.path.join(args.videos_path, name)) for name in names)
if args.dimension != 'dynamic_degree':
    with open(args.output_path + '/results_now_eval_results.json', 'w') as file:
        json.dump({{args.dimension: [len(names) / 8, names], 'mode': args.mode}}, file)
"""


def test_vbench_is_driven(folder, tmp_path, capfd):
    """A substitute with VBench's command line gets only the measured videos, under the python of its environment."""
    environment = tmp_path / 'environment'
    environment.mkdir()
    for name in ('vbench', 'python'):
        (environment / name).write_text(PROGRAM.format(python=sys.executable, environment=str(environment)))
        (environment / name).chmod(stat.S_IRWXU)
    arguments = ['--vbench', str(environment / 'vbench'), '--vbench-out', str(tmp_path / 'scores')]
    arguments += ['--vbench-mode', 'custom_input', '--json', str(tmp_path / 'm.json')]
    chosen = ['--vbench-dimensions', 'imaging_quality', 'dynamic_degree']
    assert evaluate.main([str(folder), *arguments, *chosen]) == 0
    report = json.loads((tmp_path / 'm.json').read_text())
    assert report['vbench'] == {'imaging_quality': 0.25, 'dynamic_degree': None}
    kept = json.loads((tmp_path / 'scores' / 'imaging_quality' / 'results_now_eval_results.json').read_text())
    assert kept == {'imaging_quality': [0.25, ['a cat-0.mp4', 'a cat-1.mp4']], 'mode': 'custom_input'}
    out = capfd.readouterr().out
    assert 'vbench imaging_quality: 0.2500' in out and 'vbench dynamic_degree: no result' in out

    assert evaluate.main([str(folder), *arguments, '--vbench-dimensions', 'scene']) == 2
    assert 'not in mode custom_input' in capfd.readouterr().err


# --- VBench's prompts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def vbench_environment(tmp_path_factory):
    """Make an environment with VBench's command and a package with the prompt list at VBench's path."""
    root = tmp_path_factory.mktemp('environment')
    venv.create(root, with_pip=False)
    (package,) = root.glob('lib/python3*/site-packages')
    (package / 'vbench').mkdir()
    (package / 'vbench' / '__init__.py').write_text('raise ImportError("this takes seconds and needs PyTorch")')
    rows = [{'prompt_en': name, 'dimension': ['color']} for name in ('a cat', 'a dog', 'a cat')]
    (package / 'vbench' / vbench.PROMPTS).write_text(json.dumps(rows))
    command = root / 'bin' / 'vbench'
    command.write_text(f'#!{root}/bin/python\n')
    command.chmod(stat.S_IRWXU)
    return root


def test_prompts_of_the_installed_package(vbench_environment, tmp_path):
    args = cli.parse_options(
        ['--checkpoint', '-', '--out', str(tmp_path), '--vbench', str(vbench_environment / 'bin/vbench')]
    )
    prompts = cli.find_prompts(args)
    assert prompts == ['a cat', 'a dog']
    names = [job.path.name for job in make_jobs(prompts, args.samples, args.out)[0]]
    assert names == [f'{prompt}-{i}.mp4' for prompt in prompts for i in range(5)]


def test_prompts_by_path(vbench_environment, tmp_path):
    (path,) = vbench_environment.rglob(vbench.PROMPTS)
    args = cli.parse_options(['--checkpoint', '-', '--out', str(tmp_path), '--prompts-file', str(path)])
    assert cli.find_prompts(args) == ['a cat', 'a dog']
    (tmp_path / 'wrong.json').write_text('{"prompt": 1}')
    args = cli.parse_options(['--checkpoint', '-', '--out', '-', '--prompts-file', str(tmp_path / 'wrong.json')])
    with pytest.raises(InputError, match=r'wrong\.json: not a list of prompts'):
        cli.find_prompts(args)


def test_a_command_without_the_package(tmp_path):
    command = tmp_path / 'vbench'
    command.write_text(f'#!{sys.executable}\n')
    command.chmod(stat.S_IRWXU)
    with pytest.raises(InputError, match=r'no VBench_full_info\.json in its package'):
        vbench.find_prompts(str(command))
