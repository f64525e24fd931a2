"""Command lines of all programs that write, on small inputs which these programs make themselves."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

from PIL import Image

from neodragon_jax.checkpoint.folders import TEACHER
from support.goldens import ROOT, TINY_CHECKPOINT

SIZE = ['--height', '64', '--width', '64']
CHECKPOINT = ['--checkpoint', str(TINY_CHECKPOINT)]
LONGEST_S = 480
# Seeds with which the denoisers train one stage only, so that a run compiles one step.
SEEDS = {'dmd': 2613373, 'teacher': 41, 'pruning': 41}
# Small clips, for a short step.
CLIPS = {'clips.frames': '9', 'clips.height': '32', 'clips.width': '32', 'loop.batch_size': '2'}
LOOP = {'steps': 6, 'log_every': 1, 'checkpoint_every': 1, 'evaluate_every': 0, 'keep_best': 0}
TRAININGS = ('autoencoder', 'decoder', 'dmd', 'pruning', 'super_resolution', 'teacher', 'text')
# Everything that the step distillation can keep between steps: critic, average, own histories, batches in parts.
WHOLE = {
    'dmd.objectives.adversarial.weight': '0.03',
    'dmd.own_history.first': '0.5',
    'dmd.own_history.last': '0.5',
    'dmd.own_history.videos': '2',
    'dmd.average.start': '1',
    'dmd.accumulate': '2',
    'loop.batch_size': '4',
}
PROGRAMS = (
    'neodragon_jax',
    'neodragon_jax.random_checkpoint',
    'train.moving_shapes',
    'train.moving_shapes --videos',
    'train.captioned_clips',
    'train.latents',
    'train.prompts',
    'train.text_states',
    'train.teacher_samples',
    'train.random_teacher',
    'train.prune',
    *(f'train.{name}' for name in TRAININGS),
    'train.dmd, whole recipe',
    'export',
)


def training_of(program: str) -> str | None:
    """Return which of TRAININGS a program is; None for any other."""
    name = program.removeprefix('train.').partition(',')[0]
    return name if name in TRAININGS else None


def environment() -> dict[str, str]:
    """Return the variables of a program that starts here."""
    return os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}


def start(line: list[str]) -> subprocess.Popen[bytes]:
    """Start a command."""
    return subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(line: list[str]) -> float:
    """Run a command to its end; return its seconds."""
    begun = time.monotonic()
    with start(line) as running:
        _, errors = running.communicate(timeout=LONGEST_S)
        assert running.returncode == 0, errors.decode()
    return time.monotonic() - begun


class Lines:
    """The command lines of PROGRAMS; inputs that another program makes are made when they are first needed."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self._made = folder, set[str]()
        (folder / 'prompts.txt').write_text('a cat\na dog\na bird\n')
        (folder / 'many.txt').write_text(''.join(f'a cat with {number} hats\n' for number in range(3000)))
        (folder / 'pictures').mkdir()
        for number, color in enumerate(('red', 'blue', 'gray')):
            Image.new('RGB', (64, 64), color).save(folder / 'pictures' / f'{number}.png')

    def of(self, program: str, out: pathlib.Path) -> list[str]:
        """Return the command line of a program that writes into a folder."""
        name = training_of(program)
        if name is not None:
            whole = [f'--config.{key}={value}' for key, value in WHOLE.items() if program.endswith('whole recipe')]
            return [sys.executable, '-m', f'train.{name}', *self._settings(name), *whole, f'--config.workdir={out}']
        return [sys.executable, '-m', program.split()[0], *self._options(program), '--out', str(out)]

    def made(self, program: str) -> pathlib.Path:
        """Return the output of a program, after running it."""
        out = self.folder / program.replace(' ', '').replace(',', '-')
        if program not in self._made:
            finish(self.of(program, out))
            self._made.add(program)
        return out

    def _options(self, program: str) -> list[str]:
        """Return the options of a program without a settings file, except for --out."""
        pictures, prompts = str(self.folder / 'pictures'), str(self.folder / 'prompts.txt')
        match program:
            case 'neodragon_jax':
                return ['--prompts-file', prompts, *CHECKPOINT, '--frames', '9', *SIZE]
            case 'neodragon_jax.random_checkpoint':
                return ['--tokenizers', str(TINY_CHECKPOINT), '--size', 'tiny']
            case 'train.moving_shapes':
                return ['--count', '600', '--samples-per-shard', '100']
            case 'train.moving_shapes --videos':
                return ['--count', '40', '--videos', '--frames', '17', *SIZE]
            case 'train.captioned_clips':
                videos = self.made('train.moving_shapes --videos')
                given = ['--videos', str(videos), '--captions', str(videos / 'captions.csv'), '--frames', '17']
                return [*given, '--sizes', '64x64', '--samples-per-shard', '8']
            case 'train.latents':
                clips = str(self.made('train.captioned_clips'))
                return [*CHECKPOINT, '--clips', clips, '--samples-per-shard', '8', '--dtype', 'float32', '--batch', '4']
            case 'train.prompts':
                return ['--file', str(self.folder / 'many.txt'), *CHECKPOINT, '--samples-per-shard', '500']
            case 'train.text_states':
                teacher = self.made('train.random_teacher') / 'text_encoder'
                given = ['--data', str(self.made('train.prompts')), '--teacher', str(teacher)]
                return [*given, '--samples-per-shard', '500', '--batch', '64']
            case 'train.teacher_samples':
                given = [*CHECKPOINT, '--prompts-file', prompts, '--first-frame', pictures, '--count', '12']
                steps = ['--steps', '1', '1', '1', '--first-steps', '1', '1', '1', '--dtype', 'float32']
                return [*given, *steps, '--samples-per-shard', '3', '--frames', '17', *SIZE]
            case 'train.prune':
                return ['apply', '--denoiser', str(TINY_CHECKPOINT / 'diffusion_transformer_320p'), '--keep', '1']
            case 'export':
                given = [*CHECKPOINT, '--graphs', 'context_adapter', '--image', f'{pictures}/0.png', '--frames', '9']
                counts = ['--calibration-samples', '2', '--evaluation-samples', '1', '--no-whole-video']
                return [*given, *SIZE, *counts, '--soc', 'sm8750', '--allow-below-target']
        return []

    def _settings(self, name: str) -> list[str]:
        """Return the settings of a training, except for its workdir."""
        given = {f'loop.{key}': str(value) for key, value in LOOP.items()} | {'seed': str(SEEDS.get(name, 0))}
        match name:
            case 'autoencoder':
                given |= CLIPS
            case 'decoder':
                given |= CLIPS
                given['decoder.start'] = str(self.made('train.autoencoder') / 'result' / 'pyramid_flow_vae')
            case 'dmd':
                given |= {'data': str(self.made('train.teacher_samples')), 'dmd.teacher_steps': '(1, 1, 1)'}
            case 'pruning':
                denoiser = self.made('train.teacher') / 'result' / TEACHER
                given |= {'data': str(self.made('train.latents') / '64x64'), 'denoiser': str(denoiser), 'keep': '1'}
            case 'super_resolution':
                given['data'] = str(self.made('train.moving_shapes --videos'))
            case 'teacher':
                given['data'] = str(self.made('train.latents') / '64x64')
            case 'text':
                teacher = self.made('train.random_teacher')
                given |= {'data': str(self.made('train.prompts')), 'text.held_out': '16'}
                given |= {'embedder': str(teacher / 'pyramid_flow_dit'), 'teacher': str(teacher / 'text_encoder')}
        preset = 'stage1-tiny' if name == 'pruning' else 'tiny'
        settings = [f'--config.{key}={value}' for key, value in given.items()]
        return [f'--config=configs/{name}.py:{preset}', *settings]
