"""The whole house in minutes, on the miniature checkpoint: generate, distil, generate again, export to the phone.

    make demo            (or: python demo.py --out out/demo)

Every step is one of the project's own programs, run exactly as a user would; the report gives each command with its
time and what it measured. The miniature has the released layout and random weights: the videos are noise of the right
shape, and the numbers show that the parts fit, not that the model is good.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from neodragon_jax.atomic import atomic_file
from neodragon_jax.video import read_mp4

ROOT = pathlib.Path(__file__).parent
CHECKPOINT = ROOT / 'tests' / 'goldens' / 'tiny_checkpoint'
PROMPT = 'a golden retriever runs along the beach at sunset'
SIZE = ('--frames', '25', '--height', '64', '--width', '128')
VIRTUAL_DEVICES = 8
DMD_STEPS = 30


class Step(NamedTuple):
    """One program of the demo."""

    title: str
    command: list[str]


class Done(NamedTuple):
    """A step that ran, and how long it took."""

    step: Step
    seconds: float


def steps(out: pathlib.Path) -> list[Step]:
    """Return the programs in order. Paths are relative to the checkout where possible, as a reader would type them."""
    checkpoint = os.path.relpath(CHECKPOINT, ROOT)
    student = out / 'dmd' / 'result'
    generate = ['neodragon_jax', '--checkpoint', checkpoint, '--prompt', PROMPT, *SIZE]
    data, phone, first = (str(out / name) for name in ('teacher_samples', 'phone', 'first.png'))
    samples = ['--count', '16', '--steps', '2', '2', '2', '--prompts-file', str(out / 'prompts.txt')]
    run = [f'--config.data={data}', f'--config.workdir={out / "dmd"}', f'--config.loop.steps={DMD_STEPS}']
    parts = ['--denoiser', str(student / 'diffusion_transformer_320p'), '--adapter', str(student / 'context_adapter')]
    options = ['--graphs', 'denoiser', '--precision', 'w8a16,fp16', '--calibration-samples', '24', '--simulate-video']
    return [
        Step(
            'Generate with the multi-step teacher',
            [*generate, '--mode', 'monolithic', '--steps', '4', '4', '4', '--out', str(out / 'teacher')],
        ),
        Step(
            'Write teacher samples',
            ['train.teacher_samples', '--checkpoint', checkpoint, *SIZE, *samples, '--out', data],
        ),
        Step('Distil to one step per stage', ['train.dmd', '--config=configs/dmd.py:tiny', *run]),
        Step(
            'Generate with the student',
            [*generate, '--student', str(student), '--image', first, '--out', str(out / 'student')],
        ),
        Step(
            'Export the three stages to the phone',
            ['export', '--checkpoint', checkpoint, *parts, '--image', first, *SIZE, *options, '--out', phone],
        ),
    ]


def run(step: Step, log: pathlib.Path) -> Done:
    """Run one program, its output on the console and in a log file; leave the demo if it fails."""
    print(f'\n=== {step.title}\n$ python -m {shlex.join(step.command)}', flush=True)
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(VIRTUAL_DEVICES)}
    start = time.monotonic()
    command = [sys.executable, '-m', *step.command]
    with log.open('w') as file, subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end='', flush=True)
            file.write(line)
    if process.returncode:
        sys.exit(f'demo: "{step.title}" failed with status {process.returncode}; its output is in {log}')
    return Done(step, time.monotonic() - start)


def training_table(out: pathlib.Path) -> list[str]:
    """Return the first and the last logged metrics of the DMD run as a Markdown table."""
    lines = [json.loads(line) for line in (out / 'dmd' / 'metrics.jsonl').read_text().splitlines()]
    first, last = lines[0], lines[-1]
    wanted = ('cauchy', 'endpoint_mse', 'fake_mse', 'teacher_error', 'direction_rms', 'weight', 'student_grad_norm')
    rows = [f'| {name} | {first[name]:.4g} | {last[name]:.4g} |' for name in wanted if name in first]
    return [f'| mean of the last steps until | step {first["step"]} | step {last["step"]} |', '|---|---|---|', *rows]


def report(done: Sequence[Done], out: pathlib.Path) -> str:
    """Return the report in Markdown."""
    total = sum(item.seconds for item in done)
    table = [f'| {item.step.title} | {item.seconds:.0f} |' for item in done]
    commands = [f'python -m {shlex.join(item.step.command)}' for item in done]
    phone = (out / 'phone' / 'report.md').read_text().split('\n', 1)[1]
    return '\n'.join(
        [
            '# Neodragon in JAX: demo',
            '',
            f'Made by `python demo.py --out {out}` on {platform.machine()}, {os.cpu_count()} cores, Python '
            f'{platform.python_version()}; {VIRTUAL_DEVICES} virtual CPU devices. The miniature checkpoint has random '
            'weights: the numbers show that the parts fit together, not how good the model is.',
            '',
            '| step | seconds, compilation included |',
            '|---|---|',
            *table,
            f'| all | {total:.0f} |',
            '',
            f'Teacher: ![](<teacher/{PROMPT}-0.png>)',
            '',
            f'Student: ![](<student/{PROMPT}-0.png>)',
            '',
            '## Distillation',
            '',
            *training_table(out),
            '',
            '## Phone graphs',
            phone,
            '## Commands',
            '',
            '```',
            *commands,
            '```',
            '',
        ]
    )


def main() -> int:
    """Run the demo; return the exit status."""
    parser = argparse.ArgumentParser(
        'demo.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', default='out/demo', metavar='DIR', help='default: %(default)s; made new each time')
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    if out.exists():
        # Programs resume from what they find; a demo should show them working. Nothing is deleted.
        out.rename(out.with_name(f'{out.name}-{time.strftime("%Y%m%d-%H%M%S")}'))
    (out / 'logs').mkdir(parents=True)
    (out / 'prompts.txt').write_text(f'{PROMPT}\na red ball rolls down a green hill\na ship sails through a storm\n')
    done = []
    for number, step in enumerate(steps(out)):
        done.append(run(step, out / 'logs' / f'{number}-{step.command[0]}.txt'))
        if step.command[0] == 'neodragon_jax' and not (out / 'first.png').exists():
            # The student animates a given first frame; the teacher's will do.
            Image.fromarray(read_mp4(out / 'teacher' / f'{PROMPT}-0.mp4')[0]).save(out / 'first.png')
    text = report(done, out)
    with atomic_file(out / 'report.md') as path:
        path.write_text(text)
    print(f'\n{text}\nThe report, videos, contact sheets and binaries are in {out}/.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
