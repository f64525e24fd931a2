"""Command line: prompts in, videos out. Run `python -m neodragon_jax --help`."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError, exit_status
from neodragon_jax.checkpoint import shipped
from neodragon_jax.evaluation import vbench
from neodragon_jax.evaluation.prompt_files import read_prompts
from neodragon_jax.generation import defaults as generation
from neodragon_jax.generation.defaults import RELEASED

EXAMPLES = """
What no option says is as in the checkpoint's generation.json, and what that leaves out as in the released system. An
option always wins.

examples:
  a checkpoint that says itself what to make, such as train.benchmark's:
    python -m neodragon_jax --checkpoint out/benchmark/seed-0/moving_shapes \\
        --prompt "a small red circle moves right on a blue background"

  the released system: a first frame drawn from the prompt, then 18 calls of the few-step denoiser:
    python -m neodragon_jax --checkpoint CKPT --prompt "a dog runs on the beach" --out out/

  animate a picture instead:
    python -m neodragon_jax --checkpoint CKPT --image dog.jpg --prompt "a dog runs on the beach" --out out/

  no first-frame model at all, 21 calls of a few-step denoiser that learned frame 0, too:
    python -m neodragon_jax --checkpoint CKPT --student RUN/result --first-frame denoiser --prompt "..." --out out/

  the multi-step model, no picture, five samples each of many prompts, resumable:
    python -m neodragon_jax --checkpoint CKPT --mode monolithic --prompts-file prompts.txt --num-samples 5 --out out/

  all videos that VBench judges, then its scores (see python -m neodragon_jax.evaluate --help):
    python -m neodragon_jax --checkpoint CKPT --vbench ~/vbench/bin/vbench --no-safety-checker --out out/
    python -m neodragon_jax.evaluate out/ --vbench ~/vbench/bin/vbench

  a student distilled with `python -m train.dmd`:
    python -m neodragon_jax --checkpoint CKPT --student RUN/result --image dog.jpg --prompt "..." --out out/

  a small machine: half the bytes per parameter, one module in memory at a time, and what each costs:
    python -m neodragon_jax --checkpoint CKPT --dtype bfloat16 --low-memory --profile --prompt "..." --out out/
"""
MAX_NAME_BYTES = 200


@dataclasses.dataclass(frozen=True)
class Job:
    """One video to make."""

    prompt: str
    number: int
    path: pathlib.Path


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        'python -m neodragon_jax',
        description='Turn prompts into videos with a released or distilled Neodragon checkpoint.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    released = 'default, without generation.json: %s'
    add('--checkpoint', metavar='DIR|NAME',
        help='root of a checkpoint in the released layout, or the name of one that is installed with this package '
        f'(default: {shipped.DEFAULT}, where it is installed)')  # fmt: skip
    add('--out', default='out/videos', metavar='DIR',
        help='folder for {prompt}-{i}.mp4 and {prompt}-{i}.png (default: %(default)s)')  # fmt: skip
    add('--prompt', action='append', default=[], metavar='TEXT', help='what to show; may be repeated')
    add('--prompts-file', metavar='FILE', help="text file with one prompt per line, or VBench's VBench_full_info.json")
    add('--vbench', nargs='?', const='vbench', metavar='COMMAND',
        help="make VBench's own prompts, five samples each; COMMAND is the program of its environment (default: "
        'vbench)')  # fmt: skip
    add('--image', metavar='FILE', help='first frame, resized to the video')
    add('--first-frame', choices=generation.FIRST_FRAMES,
        help='who makes the first frame in hybrid mode, without --image: the first-frame model of the checkpoint, or '
        f'the few-step denoiser, as it makes all others ({released % RELEASED.hybrid.first_frame})')  # fmt: skip
    add('--mode', choices=generation.MODES,
        help='hybrid: a first frame, then the few-step model; monolithic: all frames by the multi-step model '
        f'({released % RELEASED.mode})')  # fmt: skip
    add('--student', metavar='DIR', help="folder with a distilled student's denoiser and context adapter")
    add('--upscale', metavar='DIR', help='folder of a super-resolution network, see train.super_resolution')
    few, many = RELEASED.hybrid, RELEASED.monolithic
    steps = [' '.join(map(str, count)) for count in (few.steps, many.steps, many.first_steps)]
    add('--steps', type=int, nargs=3, metavar='N',
        help=f'steps per stage, coarsest first ({released % steps[0]}, or {steps[1]})')  # fmt: skip
    add('--first-steps', type=int, nargs=3, metavar='N',
        help=f'the same for unit 0 ({released % "--steps"}, or {steps[2]})')  # fmt: skip
    add('--guidance', type=float, metavar='G',
        help=f'classifier-free guidance ({released % "none"}, or {many.guidance:g})')  # fmt: skip
    add('--first-guidance', type=float, metavar='G',
        help=f'the same for unit 0 ({released % "--guidance"}, or {many.first_guidance:g})')  # fmt: skip
    add(
        '--prompt-modifier',
        metavar='TEXT',
        help=f'appended to every prompt ({released % "the released one"})',
    )
    add(
        '--negative-prompt',
        metavar='TEXT',
        help=f'what guidance steers away from ({released % repr(RELEASED.negative_prompt)})',
    )
    add('--frames', type=int, metavar='N', help=f'video frames, 8 n + 1 ({released % RELEASED.frames})')
    add('--height', type=int, metavar='PX', help=released % RELEASED.height)
    add('--width', type=int, metavar='PX', help=released % RELEASED.width)
    add('--seed', type=int, default=0, help='default: %(default)s')
    add('--num-samples', type=int, metavar='N', help='videos per prompt (default: 1, or 5 with --vbench)')
    add('--dtype', choices=('float32', 'bfloat16'), default='float32',
        help='compute type; bfloat16 also halves the memory for parameters: all are held in it but norms, biases, '
        'positions and what embeds timesteps (default: %(default)s)')  # fmt: skip
    add('--low-memory', action='store_true',
        help='hold one module at a time (text encoders, first-frame model, encoder, denoiser, decoder), each loaded '
        'once for up to 16 videos per device; the videos are the same')  # fmt: skip
    add('--profile', action='store_true',
        help='measure each module; the table of times, tokens and peak memory goes to the end of the output and to '
        'OUT/profile.md')  # fmt: skip
    add('--no-safety-checker', action='store_true',
        help="do not blacken what the checkpoint's safety_checker refuses (if it has none, nothing is)")  # fmt: skip
    add('--distributed', action='store_true',
        help='this is one of several processes that share the prompts and OUT; they find each other on a TPU pod, '
        'under Slurm or Open MPI, else set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID')  # fmt: skip
    return parser.parse_args(argv)


def asked_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts of the command line, of the prompts file and of VBench, without repetitions."""
    prompts = list(args.prompt)
    if args.prompts_file is not None:
        prompts += read_prompts(args.prompts_file)
    if args.vbench is not None:
        prompts += read_prompts(vbench.find_prompts(args.vbench))
    if not prompts:
        example = generation.read(shipped.find(args.checkpoint)).example
        raise InputError(f'no prompt given. Use --prompt "{example or "TEXT"}", --prompts-file FILE or --vbench.')
    return list(dict.fromkeys(prompts))


def video_name(prompt: str, number: int) -> str:
    """Return `{prompt}-{number}` as VBench expects it, kept to what a file system takes."""
    name = prompt.replace('/', '_').replace('\0', '')
    if len(name.encode()) > MAX_NAME_BYTES:
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
        name = name.encode()[:MAX_NAME_BYTES].decode(errors='ignore') + '~' + digest
    return f'{name}-{number}'


def share(jobs: Sequence[Job], index: int, count: int) -> list[Job]:
    """Return the jobs of one of `count` processes: every count-th, so that all have as many, to within one."""
    return list(jobs[index::count])


def make_jobs(args: argparse.Namespace, prompts: Sequence[str], index: int = 0, count: int = 1) -> list[Job]:
    """Return what process `index` of `count` has to make and is not there yet."""
    samples = (1 if args.vbench is None else vbench.SAMPLES) if args.num_samples is None else args.num_samples
    if samples < 1:
        raise InputError(f'--num-samples is {samples}; give at least 1.')
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    named = [
        Job(prompt, number, out / f'{video_name(prompt, number)}.mp4')
        for prompt in prompts
        for number in range(samples)
    ]
    # Shared before looking what exists: by then, another process may have made some of its own.
    named = share(named, index, count)
    # The contact sheet is written first, so a video that is there is complete.
    todo = [job for job in named if not job.path.exists()]
    if len(todo) < len(named):
        print(
            f'{len(named) - len(todo)} of {len(named)} videos exist already in {out}; delete them to make them again.'
        )
    return todo


def batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Cut jobs into lists of `size`; the last may be shorter."""
    for start in range(0, len(jobs), size):
        yield list(jobs[start : start + size])


def run(args: argparse.Namespace) -> None:
    """Make all videos of a command line."""
    prompts, process = asked_prompts(args), (0, 1)
    if args.distributed:
        from neodragon_jax.generation.session import start_processes

        process = start_processes()
    jobs = make_jobs(args, prompts, *process)
    if not jobs:
        return
    # Only now: JAX and the models take seconds to import, and the checks above should answer at once.
    import tqdm

    from neodragon_jax.base import video
    from neodragon_jax.generation.session import Studio

    studio = Studio.open(args, videos=len(jobs))
    size, devices = len(studio.spread.devices), studio.spread.devices
    print(f'{len(jobs)} videos of {"x".join(map(str, studio.size))}, {studio.calls} denoiser calls each, on '
          f'{size} x {devices[0].platform}')  # fmt: skip
    start = time.monotonic()
    with tqdm.tqdm(total=math.ceil(len(jobs) / size) * studio.steps, unit='step', disable=None) as bar:

        def advance(phase: str) -> None:
            bar.set_postfix_str(phase, refresh=False)
            bar.update()

        for batch in batches(jobs, studio.videos_at_once):
            bar.set_description(batch[0].prompt[:32])
            clips = studio.make([job.prompt for job in batch], [job.number for job in batch], advance)
            for job, clip in zip(batch, clips, strict=True):
                video.contact_sheet(job.path.with_suffix('.png'), clip.frames)
                video.write_mp4(job.path, clip.frames, fps=24)
                note = ' (refused by the safety checker, made black)' if clip.refused else ''
                bar.write(f'{job.path}{note}', file=sys.stdout)
    print(f'{len(jobs)} videos in {time.monotonic() - start:.1f} s, compilation included')
    if studio.profile is not None:
        report = studio.profile.report(studio.store.sizes)
        print(f'\n{report}', end='')
        name = 'profile.md' if process[1] == 1 else f'profile-{process[0]}.md'
        with atomic_file(pathlib.Path(args.out) / name) as path:
            path.write_text(report, encoding='utf-8')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_args(argv)))


if __name__ == '__main__':
    sys.exit(main())
