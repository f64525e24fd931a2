"""Programs killed with SIGKILL at random moments: run again, they end with exactly the files of an uninterrupted run.

Training runs, sample sets of the teacher and jobs of several processes are killed in tests/train/runtime/test_kill.py
and tests/train/data/test_writer_kill.py. The files of train.shapes.language differ between two unbroken runs, because
the training of its tokenizer depends on the order of hashes.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from neodragon_jax.base.files import file_sha256
from neodragon_jax.base.video import read_mp4
from support.goldens import GOLDENS, TINY_CHECKPOINT
from train.data import SampleSource
from train.data.manifest import MANIFEST, is_sample_set

ROOT = GOLDENS.parents[1]
KILLS = 10
SIZE = ['--frames', '9', '--height', '64', '--width', '64']


def command(program: str, inputs: pathlib.Path, out: pathlib.Path) -> list[str]:
    """Return the command of a program; its inputs are made by `make_inputs`."""
    checkpoint, prompts = ['--checkpoint', str(TINY_CHECKPOINT)], str(inputs / 'prompts.txt')
    lines = {
        'neodragon_jax': ['--prompts-file', prompts, *checkpoint, *SIZE],
        'neodragon_jax.random_checkpoint': ['--tokenizers', str(TINY_CHECKPOINT), '--size', 'tiny'],
        'train.moving_shapes': ['--count', '600', '--samples-per-shard', '100'],
        'train.moving_shapes --videos': ['--count', '40', '--videos'],
        'train.captioned_clips': ['--videos', str(inputs / 'videos'), '--frames', '17', '--sizes', '64x64'],
        'train.prompts': ['--file', str(inputs / 'many.txt'), *checkpoint, '--samples-per-shard', '500'],
        'train.random_teacher': [],
        'train.prune': [],
    }
    arguments = lines[program]
    if program == 'train.prune':
        arguments = ['apply', '--denoiser', str(TINY_CHECKPOINT / 'diffusion_transformer_320p'), '--keep', '1']
    if program == 'train.captioned_clips':
        arguments += ['--captions', str(inputs / 'videos' / 'captions.csv'), '--samples-per-shard', '8']
    return [sys.executable, '-m', program.split()[0], *arguments, '--out', str(out)]


PROGRAMS = (
    *('neodragon_jax', 'neodragon_jax.random_checkpoint', 'train.moving_shapes', 'train.moving_shapes --videos'),
    *('train.captioned_clips', 'train.prompts', 'train.random_teacher', 'train.prune'),
)


@pytest.fixture(scope='module')
def inputs(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp('inputs')
    (folder / 'prompts.txt').write_text('a cat\na dog\na bird\n')
    (folder / 'many.txt').write_text(''.join(f'a cat with {number} hats\n' for number in range(3000)))
    finish(command('train.moving_shapes --videos', folder, folder / 'videos'))
    return folder


def process(line: list[str]) -> subprocess.Popen:
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
    return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(line: list[str]) -> float:
    """Run a command to its end; return its seconds."""
    start = time.monotonic()
    with process(line) as running:
        _, errors = running.communicate(timeout=400)
        assert running.returncode == 0, errors.decode()
    return time.monotonic() - start


def files(folder: pathlib.Path) -> dict[str, str]:
    """Return a digest of every file of a folder, hidden ones included.

    The bytes of videos and shards depend on threads and on the order of keys, so their content is taken.
    """
    found = {}
    for path in sorted(path for path in folder.rglob('*') if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == '.mp4':
            found[name] = str(np.round(read_mp4(path).mean(axis=(1, 2, 3))).tolist())
        elif is_sample_set(path.parent) or is_sample_set(path.parent.parent):
            found[name] = ''
        else:
            found[name] = file_sha256(path)
        if path.name == MANIFEST:
            source = SampleSource(path.parent, verify=True)
            found[name] = hashlib.sha256(
                ''.join(sample_text(source[i]) for i in range(len(source))).encode()
            ).hexdigest()
    return found


def sample_text(sample) -> str:
    """Return a sample as text; of clips only whether there are bytes."""
    return str(
        sorted((name, len(v) > 0 if isinstance(v, bytes) else np.asarray(v).tolist()) for name, v in sample.items())
    )


@pytest.mark.slow
@pytest.mark.parametrize('program', PROGRAMS)
def test_a_killed_program_ends_like_an_unbroken_one(program, inputs, tmp_path):
    finish(command(program, inputs, tmp_path / 'warm'))  # fills the compile cache
    seconds = finish(command(program, inputs, tmp_path / 'whole'))
    clock, line = random.Random(program), command(program, inputs, tmp_path / 'out')
    killed = 0
    while killed < KILLS:
        with process(line) as running:
            try:
                _, errors = running.communicate(timeout=clock.uniform(0.1, 1) * seconds)
            except subprocess.TimeoutExpired:
                running.kill()
                running.communicate()
                killed += 1
            else:
                assert running.returncode == 0, errors.decode()
                # It has ended before it was killed: begin again in another folder.
                assert files(tmp_path / 'out') == files(tmp_path / 'whole')
                (tmp_path / 'out').rename(tmp_path / f'finished-{killed}-{clock.random()}')
    finish(line)
    assert files(tmp_path / 'out') == files(tmp_path / 'whole')
