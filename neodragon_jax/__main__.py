"""Command line: prompts in, videos out. Run `python -m neodragon_jax --help`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.bucket import StoragePath
from neodragon_jax.base.command_line import PathOption, add_distributed, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.output import output_folder
from neodragon_jax.base.progress import ProgressBar
from neodragon_jax.checkpoint import folders, hub, shipped
from neodragon_jax.evaluation import vbench
from neodragon_jax.evaluation.prompt_files import read_prompts
from neodragon_jax.generation import checks, defaults
from neodragon_jax.generation.arguments import add_sampling_options, add_video_options, released
from neodragon_jax.generation.defaults import RELEASED
from neodragon_jax.generation.jobs import Job, Jobs, make_jobs
from neodragon_jax.generation.options import DTYPES, NOISES, ModelOptions, VideoOptions, check_seed

if TYPE_CHECKING:
    from neodragon_jax.api import Progress, System

EXAMPLES = """
Options override the checkpoint's generation.json, which overrides the released defaults. An option always wins.

examples:
  the shipped checkpoint, with its own defaults:
    python -m neodragon_jax --prompt "a small red circle moves right on a blue background"

  the released system: a first frame drawn from the prompt, then 18 calls of the few-step denoiser:
    python -m neodragon_jax --checkpoint CKPT --prompt "a dog runs on the beach" --out out/

  animate a picture:
    python -m neodragon_jax --checkpoint CKPT --image dog.jpg --prompt "a dog runs on the beach" --out out/

  a student distilled with `python -m train.dmd` that also learned the first frame, 21 calls:
    python -m neodragon_jax --checkpoint CKPT --student RUN/result --first-frame denoiser --prompt "..." --out out/

  the multi-step model, five samples of every prompt of a file; the same command continues an interrupted run:
    python -m neodragon_jax --checkpoint CKPT --mode monolithic --prompts-file prompts.txt --num-samples 5 --out out/

  the videos for VBench, then their scores (see python -m neodragon_jax.evaluate --help):
    python -m neodragon_jax --checkpoint CKPT --vbench ~/vbench/bin/vbench --no-safety-checker --out out/
    python -m neodragon_jax.evaluate out/ --vbench ~/vbench/bin/vbench

  a small machine: half the bytes per parameter, one module in memory at a time, and the cost of each:
    python -m neodragon_jax --checkpoint CKPT --dtype bfloat16 --low-memory --profile --prompt "..." --out out/
"""


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Options of one run of this command.

    Attributes:
      model: options that take effect when the checkpoint is loaded.
      video: options of the videos.
      prompts: texts from the command line.
      prompts_file: file with more prompts.
      vbench: VBench's program, whose own prompts are added.
      out: folder of the videos.
      seed: of all videos.
      num_samples: videos per prompt; None is 1, or VBench's number.
      distributed: whether this is one of several processes that share the prompts.
      start_timeout_s: seconds within which these processes must have started.
      compile_cache: whether compiled programs are kept on disk.
    """

    model: ModelOptions
    video: VideoOptions
    prompts: tuple[str, ...]
    prompts_file: StoragePath | None
    vbench: str | None
    out: StoragePath
    seed: int
    num_samples: int | None
    distributed: bool
    start_timeout_s: float
    compile_cache: bool

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.num_samples is not None and self.num_samples < 1:
            raise InputError(f'--num-samples is {self.num_samples}; give at least 1.')

    @property
    def samples(self) -> int:
        """Videos per prompt."""
        default = 1 if self.vbench is None else vbench.SAMPLES
        return default if self.num_samples is None else self.num_samples


def parse_options(argv: Sequence[str] | None = None) -> GenerateOptions:
    """Return the options of a command line.

    Raises:
      InputError: a value is out of range.
    """
    args = vars(_parser().parse_args(argv))
    take = lambda kind: kind(**{field.name: args.pop(field.name) for field in dataclasses.fields(kind)})
    model, video = take(ModelOptions), take(VideoOptions)
    return GenerateOptions(model=model, video=video, prompts=tuple(args.pop('prompt')), **args)


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(
        'python -m neodragon_jax',
        'Turn prompts into videos with a released or distilled Neodragon checkpoint.',
        EXAMPLES,
    )
    _add_prompts(parser)
    _add_model(parser)
    add_video_options(parser)
    add_sampling_options(parser)
    return parser


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add the options of inputs and outputs."""
    add = parser.add_argument_group('prompts and files').add_argument
    add('--prompt', action='append', default=[], metavar='TEXT', help='text to show as a video; may be repeated')
    add('--prompts-file', action=PathOption, bucket=True, metavar='FILE',
        help="prompts: text with one per line, JSON, JSONL or CSV, also VBench's VBench_full_info.json")  # fmt: skip
    add('--vbench', nargs='?', const='vbench', metavar='COMMAND',
        help="make VBench's own prompts, five samples each; COMMAND is the program of its environment (default: "
        'vbench)')  # fmt: skip
    add('--out', action=PathOption, bucket=True, default='out/videos', metavar='DIR',
        help='folder for {prompt}-{i}.mp4 and {prompt}-{i}.png (default: %(default)s)')  # fmt: skip
    add('--num-samples', type=int, metavar='N', help='videos per prompt (default: 1, or 5 with --vbench)')
    add('--seed', type=int, default=0, help='seed of all videos, 0 to 4294967295 (default: %(default)s)')
    add('--noise', choices=NOISES, default='jax',
        help="jax: JAX's own generator; portable: one that every runtime reproduces, by seed + sample number, so "
        'that a phone makes the same video (default: %(default)s)')  # fmt: skip
    add_distributed(add, 'share the prompts and OUT with other processes')


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of the checkpoint and of its place in memory."""
    add = parser.add_argument_group('model').add_argument
    add('--checkpoint', action=PathOption, names=('hf',), bucket=True, metavar='DIR|NAME',
        help='root of a checkpoint in the released layout, the name of one that is installed with this package, or one '
        'of the Hugging Face hub, hf://ORG/NAME@REVISION, of which the folders that the mode needs are downloaded '
        f'(default: {shipped.DEFAULT}, where it is installed)')  # fmt: skip
    add('--mode', choices=defaults.MODES,
        help='hybrid: a first frame, then the few-step model; monolithic: all frames by the multi-step model '
        f'({released(RELEASED.mode)})')  # fmt: skip
    add('--student', action=PathOption, names=('hf',), bucket=True, metavar='DIR',
        help='folder, or hf://ORG/NAME@REVISION, of a distilled denoiser and context adapter')  # fmt: skip
    add('--upscale', action=PathOption, bucket=True, metavar='DIR',
        help='folder of a super-resolution network, see train.super_resolution')  # fmt: skip
    add('--dtype', choices=DTYPES, default='float32',
        help='compute type; bfloat16 halves the memory of parameters (norms, biases, positions and timestep embeddings '
        'stay float32; default: %(default)s)')  # fmt: skip
    add('--low-memory', action='store_true',
        help='hold one module at a time (text encoders, first-frame model, encoder, denoiser, decoder), each loaded '
        'once for up to 16 videos per device; the videos are the same')  # fmt: skip
    add('--profile', action='store_true',
        help='time each module; prints a table of times, tokens and peak memory, also to OUT/profile.md')  # fmt: skip
    add('--no-compile-cache', action='store_false', dest='compile_cache',
        help='do not keep compiled programs in the cache folder of the user')  # fmt: skip
    add('--no-safety-checker', action='store_false', dest='safety_checker',
        help='keep videos that the safety_checker of the checkpoint refuses (default: they are made black; without '
        'that component none is refused)')  # fmt: skip


def find_prompts(options: GenerateOptions) -> list[str]:
    """Return the prompts of the command line, of the prompts file and of VBench, cleaned and without repetitions.

    Raises:
      InputError: there is none, or one is empty or damaged.
    """
    prompts = [checks.prompt('--prompt', text) for text in options.prompts]
    if options.prompts_file is not None:
        prompts += read_prompts(options.prompts_file)
    if options.vbench is not None:
        prompts += read_prompts(vbench.find_prompts(options.vbench), '--vbench')
    if not prompts:
        example = defaults.read(options.model.checkpoint).example
        raise InputError(f'no prompt given. Use --prompt "{example or "TEXT"}", --prompts-file FILE or --vbench.')
    return list(dict.fromkeys(prompts))


def load_system(options: GenerateOptions, videos: int) -> System:
    """Load the checkpoint on at most one device per video; print its name if the command line gives none.

    Raises:
      InputError: an option does not fit the checkpoint, or a file is missing or damaged.
    """
    # Imported late: JAX and the models take seconds to import, and wrong options should fail at once.
    import jax

    from neodragon_jax import api
    from neodragon_jax.generation.plan import video_settings

    values = defaults.read(options.model.checkpoint)
    if options.model.checkpoint is None:
        about = f', trained on {values.prompts}' if values.prompts else ''
        print(f'Using the shipped checkpoint {shipped.DEFAULT}{about}. --checkpoint takes another.')
    mode = options.model.mode or values.mode
    settings = video_settings(
        options.video, mode, values
    )  # refuses wrong values before anything is downloaded or loaded
    first_frame = 'denoiser' if settings.picture is not None else settings.first_frame
    root = shipped.find(options.model.checkpoint, hub.needed_folders(mode, first_frame))
    given = dataclasses.asdict(options.model) | {'checkpoint': root, 'devices': jax.local_devices()[:videos]}
    system = api.load(**given)
    if options.model.safety_checker and not system.checks_safety:
        print(f'No {folders.SAFETY_CHECKER} in {root}: videos are not checked for unsafe content.')
    return system


def run(options: GenerateOptions) -> None:
    """Make all videos of a command line."""
    prompts = find_prompts(options)
    if not options.distributed:
        make_share(options, prompts, 0, 1)
        return
    from neodragon_jax.base.processes import separate_shares

    with separate_shares(options.distributed, options.start_timeout_s, options.out) as (index, count):
        make_share(options, prompts, index, count)


def make_share(options: GenerateOptions, prompts: Sequence[str], index: int, count: int) -> None:
    """Make the videos of process `index` of `count`."""
    jobs = make_jobs(prompts, options.samples, options.out, index, count)
    from neodragon_jax.generation.record import make_record

    record = make_record(options.model, options.video, options.seed)
    tell_existing(jobs, record, options.out)
    if jobs.todo:
        with output_folder(options.out, index, count):
            make_videos(options, jobs.todo, record, index, count)


def tell_existing(jobs: Jobs, record: Mapping[str, Any], out: StoragePath) -> None:
    """Print how many videos exist.

    Raises:
      InputError: one was made with other settings.
    """
    from neodragon_jax.generation.record import check_record

    unknown = [job for job in jobs.made if not check_record(job.path.with_suffix('.png'), record)]
    if jobs.made:
        total = len(jobs.made) + len(jobs.todo)
        print(f'{len(jobs.made)} of {total} videos exist already in {out}; delete them to make them again.')
    if unknown:
        print(f'{len(unknown)} of these do not tell how they were made and are kept, such as {unknown[0].path}.')
    if jobs.damaged:
        print(f'{len(jobs.damaged)} videos are damaged, or without their contact sheet, and are made again, such as '
              f'{jobs.damaged[0].path}.')  # fmt: skip


def make_videos(
    options: GenerateOptions, jobs: Sequence[Job], record: Mapping[str, Any], index: int, count: int
) -> None:
    """Load the checkpoint and make the videos of some jobs, those of process `index` of `count`."""
    if options.compile_cache:
        from neodragon_jax.base.compile_cache import use_compile_cache

        use_compile_cache()
    system = load_system(options, videos=len(jobs))
    start = time.monotonic()
    write_videos(system, options, jobs, record)
    print(f'{len(jobs)} videos in {time.monotonic() - start:.1f} s, compilation included')
    profile = system.loaded.profile
    if profile is not None:
        report = profile.report(system.loaded.store.sizes)
        print(f'\n{report}', end='')
        with atomic_file(options.out / ('profile.md' if count == 1 else f'profile-{index}.md')) as path:
            path.write_text(report, encoding='utf-8')


def write_videos(system: System, options: GenerateOptions, jobs: Sequence[Job], record: Mapping[str, Any]) -> None:
    """Generate the videos of some jobs, and write each with its contact sheet as soon as it is finished."""
    from neodragon_jax.generation.record import write_sheet

    session, devices = system.session(options.video, options.seed), system.loaded.spread.devices
    print(f'{len(jobs)} videos of {"x".join(map(str, session.size))}, {session.calls} denoiser calls each, on '
          f'{len(devices)} x {devices[0].platform}')  # fmt: skip
    _warn_of_cut_prompts(system, session.settings.modifier, jobs)
    with ProgressBar(unit='step') as bar:

        def advance(progress: Progress) -> None:
            bar.total = progress.total
            bar.set_postfix_str(progress.phase, refresh=False)
            bar.update()

        prompts, numbers = [job.prompt for job in jobs], [job.number for job in jobs]
        made = system.stream(prompts, numbers, options.seed, options.video, advance)
        for job, clip in zip(jobs, made, strict=True):
            write_sheet(job.path.with_suffix('.png'), clip, record)
            clip.save(job.path)
            note = ' (refused by the safety checker, made black)' if clip.refused else ''
            bar.write(f'{job.path}{note}', file=sys.stdout)


def _warn_of_cut_prompts(system: System, modifier: str, jobs: Sequence[Job]) -> None:
    """Print the number of prompts that exceed the text encoder's limit."""
    from neodragon_jax.generation.tokens import cut_notice

    tokenizers = system.loaded.components.tokenizers
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    notice = cut_notice(tokenizers.t5, prompts, modifier) if tokenizers else ''
    print(notice, end='\n' if notice else '')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_options(argv)))


if __name__ == '__main__':
    sys.exit(main())
