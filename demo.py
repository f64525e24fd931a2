"""Run the whole project in minutes on the shipped checkpoint: generate, distill, generate again, export to the phone.

    make demo            (or: python demo.py --out out/demo)

Every step is one of the project's programs, run as a user would run it; the report gives each command with its time
and its measurements. The checkpoint was trained by `train.benchmark` on videos of one moving shape, so that the pixels
of a video tell whether it shows its prompt.
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

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.video import read_mp4
from neodragon_jax.checkpoint import shipped
from neodragon_jax.generation import defaults as generation
from train.shapes.attributes import measure
from train.shapes.captions import caption, parse
from train.shapes.world import CPU, Traits

ROOT = pathlib.Path(__file__).parent
CHECKPOINT = shipped.find(shipped.DEFAULT)
PROMPT = 'a small red circle moves right on a blue background'
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
    checkpoint, own = os.path.relpath(CHECKPOINT, ROOT), generation.read(CHECKPOINT)
    result, data, phone = out / 'dmd' / 'result', str(out / 'teacher_samples'), str(out / 'phone')
    generate = ['neodragon_jax', '--prompt', PROMPT]
    prompts = ['--prompts-file', str(out / 'prompts.txt')]
    counts, guidance = [str(count) for count in own.monolithic.steps], str(own.monolithic.guidance)
    samples = ['--frames', str(own.frames), '--height', str(own.height), '--width', str(own.width)]
    samples += ['--steps', *counts, '--first-steps', *counts, '--guidance', guidance, '--first-guidance', guidance]
    samples += ['--prompt-modifier', '', '--negative-prompt', '', '--count', '64', '--batch', '4']
    run = [f'--config.checkpoint={checkpoint}', f'--config.data={data}', f'--config.workdir={out / "dmd"}']
    parts = ['--student', str(result)]
    options = ['--graphs', 'denoiser', '--precision', 'w8a16,fp16', '--calibration-samples', '24']
    options += ['--whole-videos', '2', '--simulate-video']
    return [
        Step('Generate with the few-step student', [*generate, '--out', str(out / 'student')]),
        Step(
            'Generate with the multi-step teacher',
            [*generate, '--mode', 'monolithic', '--out', str(out / 'teacher')],
        ),
        Step(
            'Write teacher samples',
            ['train.teacher_samples', '--checkpoint', checkpoint, *prompts, *samples, '--out', data],
        ),
        Step(
            'Distill to one step per stage',
            [
                'train.dmd',
                '--config=configs/dmd.py:shapes',
                *run,
                f'--config.loop.steps={DMD_STEPS}',
                '--config.loop.log_every=10',
            ],
        ),
        Step(
            'Generate with the new student',
            [*generate, '--student', str(result), '--out', str(out / 'new_student')],
        ),
        Step(
            'Export the three stages to the phone',
            ['export', '--checkpoint', checkpoint, *parts, *options, '--out', phone],
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


def videos(out: pathlib.Path) -> list[str]:
    """Return a Markdown table of the attributes that each video shows, and the contact sheets."""
    lines = [
        f'| video | {" | ".join(Traits._fields)} | motion, 1 as captioned |',
        f'|---{"|---" * len(Traits._fields)}|---|',
    ]
    sheets = []
    for who in ('student', 'teacher', 'new_student'):
        seen = measure(read_mp4(out / who / f'{PROMPT}-0.mp4'), parse(PROMPT), CPU)
        values = ' | '.join(str(getattr(seen, name)) for name in Traits._fields)
        lines.append(f'| {who} | {values} | {seen.motion:.2f} |')
        sheets += ['', f'{who}:', '', f'![](<{who}/{PROMPT}-0.png>)']
    return [*lines, *sheets]


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
            f'{platform.python_version()}; {VIRTUAL_DEVICES} virtual CPU devices.',
            '',
            '| step | seconds, compilation included |',
            '|---|---|',
            *table,
            f'| all | {total:.0f} |',
            '',
            '## Videos',
            '',
            f'"{PROMPT}", as read from the pixels; the new student learned for {DMD_STEPS} steps:',
            '',
            *videos(out),
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
    parser.add_argument(
        '--out',
        default='out/demo',
        metavar='DIR',
        help='folder of all results, made new each time (default: %(default)s)',
    )
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    if out.exists():
        # Programs resume from existing results, but a demo should run everything. Nothing is deleted.
        out.rename(out.with_name(f'{out.name}-{time.strftime("%Y%m%d-%H%M%S")}'))
    (out / 'logs').mkdir(parents=True)
    (out / 'prompts.txt').write_text('\n'.join(map(caption, CPU.combinations('train'))) + '\n')
    done = [run(step, out / 'logs' / f'{number}-{step.command[0]}.txt') for number, step in enumerate(steps(out))]
    text = report(done, out)
    with atomic_file(out / 'report.md') as path:
        path.write_text(text)
    print(f'\n{text}\nThe report, videos, contact sheets and binaries are in {out}/.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
