"""Export a checkpoint to Snapdragon context binaries, and report their fidelity. See `python -m export --help`."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from neodragon_jax.base.atomic import check_writable
from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.lists import known_entries
from neodragon_jax.checkpoint import hub, shipped
from neodragon_jax.generation import defaults as generation
from neodragon_jax.generation.defaults import RELEASED
from neodragon_jax.generation.options import check_seed
from neodragon_jax.generation.plan import make_plan

if TYPE_CHECKING:
    from export.host.denoiser_choice import DenoiserChoice
    from export.host.modules import ProgramOptions
    from export.host.prompts import PromptLists
    from export.host.recording import Scenes
    from export.report.report import Report
    from export.steps.options import ExportOptions, GraphOptions
    from neodragon_jax.generation.defaults import GenerationDefaults

PACKAGES = ('jax2onnx', 'onnx', 'onnxruntime', 'onnxruntime_qnn')
_SOURCE = pathlib.Path(__file__).resolve().parents[1]
_DEFAULT = "(default: the checkpoint's generation.json, or else %s)"

EXAMPLES = """
examples:
  the shipped checkpoint for Snapdragon 8 Elite, quantized and compiled but not simulated, in a few minutes:
    python -m export --checkpoint moving_shapes --soc sm8750 --no-simulate --out phone/

  the whole released system for two chipsets, calibrated on 50 generated videos:
    python -m export --checkpoint CKPT --soc sm8750,sc8380xp --prompts 50 --out phone/

  the denoiser of a distilled student, in two precisions, calibrated on a first frame of your own:
    python -m export --checkpoint CKPT --student RUN/result --graphs denoiser --precision w8a16,fp16 \\
        --image dog.jpg --no-simulate --out phone/

  the video decoder alone, with three rules for activation ranges compared:
    python -m export --checkpoint CKPT --graphs video_decoder --ranges minmax,percentile,mse --out phone/

Every finished step is kept and checked by its hashes: the same command resumes after an interruption.
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(
        'python -m export',
        'Export the modules of a checkpoint: convert JAX to ONNX, quantize on recorded generations,\n'
        'compile to QNN context binaries, run them on the HTP simulator, and compare them with JAX in float32, by SNR\n'
        '(signal-to-noise ratio).',
        EXAMPLES,
        status='1    a graph is below its target, and --allow-below-target is not given',
    )
    parser.add_argument('--checkpoint', action=PathOption, bucket=True, names=('hf',), required=True,
        metavar='DIR|NAME',
        help='root folder of a checkpoint in the released layout, also in a bucket, the name of a shipped one, or '
        'hf://ORG/NAME@REVISION, of which the needed folders are downloaded')  # fmt: skip
    parser.add_argument('--out', action=PathOption, required=True, metavar='DIR',
        help='output folder: {graph}-{runtime}-{precision}-{chipset}/, calibration/, report.*')  # fmt: skip
    _add_program(parser.add_argument_group('program'))
    _add_calibration(parser.add_argument_group('calibration and evaluation'))
    _add_graphs(parser.add_argument_group('quantization and compilation'))
    _add_measurements(parser.add_argument_group('measurements'))
    return parser.parse_args(argv)


def _add_program(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add('--graphs', metavar='LIST',
        help='comma-separated graphs, or groups such as "denoiser" and "first_frame" (default: all)')  # fmt: skip
    add('--student', action=PathOption, bucket=True, names=('hf',), metavar='DIR',
        help='distilled student, such as RUN/result of train.dmd or hf://ORG/NAME@REVISION: its denoiser and context '
        'adapter are exported with the schedule of its student.json')  # fmt: skip
    add('--denoiser', action=PathOption, metavar='DIR',
        help="denoiser folder to export instead of the checkpoint's; a student.json beside the folder sets the "
        'schedule')  # fmt: skip
    add('--adapter', action=PathOption, metavar='DIR', help="context adapter folder to use instead of the checkpoint's")
    add('--upscale', action=PathOption, metavar='DIR', help='folder of a QuickSRNet; super_resolution is exported, too')
    add('--mode', choices=generation.MODES,
        help=f'mode, which selects the denoiser {_DEFAULT % RELEASED.mode}')  # fmt: skip
    add('--first-frame', choices=generation.FIRST_FRAMES,
        help='source of frame 0 in hybrid mode: the first-frame model, whose graphs are then exported, '
        f'or the few-step denoiser {_DEFAULT % RELEASED.hybrid.first_frame}')  # fmt: skip
    add('--frames', type=int, metavar='N', help=f'video frames, 8 n + 1 {_DEFAULT % RELEASED.frames}')
    add('--height', type=int, metavar='PX', help=f'height of the video {_DEFAULT % RELEASED.height}')
    add('--width', type=int, metavar='PX', help=f'width of the video {_DEFAULT % RELEASED.width}')
    add('--steps', type=int, nargs=3, metavar='N',
        help="denoiser steps per stage (default: the student's, or else the mode's)")  # fmt: skip


def _add_calibration(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add('--calibration', action=PathOption, metavar='DIR',
        help='calibration set to record or to reuse (default: OUT/calibration)')  # fmt: skip
    add('--prompts', type=int, metavar='N',
        help='videos to record for calibration, one prompt each (default: as many as the samples need)')  # fmt: skip
    add('--prompts-file', action=PathOption, metavar='FILE',
        help="calibration prompts, one per line (default: the checkpoint's calibration_prompts.txt, or else a built-in "
        'list)')  # fmt: skip
    add('--validation-prompts', type=int, default=8, metavar='N',
        help='calibration prompts held out to choose quantization settings on, at most a third of the list; one video '
        'each is recorded (default: %(default)s)')  # fmt: skip
    add('--evaluation-prompts', type=int, default=8, metavar='N',
        help='prompts that graphs are evaluated on; one video each is recorded (default: %(default)s)')  # fmt: skip
    add('--evaluation-prompts-file', action=PathOption, metavar='FILE',
        help="evaluation prompts, one per line, none of them a calibration prompt (default: the checkpoint's "
        'evaluation_prompts.txt, or else a built-in list)')  # fmt: skip
    add('--image', action=PathOption, append=True, default=[], metavar='FILE',
        help='first frame of the recorded videos, for calibration and evaluation; may be repeated '
        '(default: generated from the prompt)')  # fmt: skip
    add('--calibration-samples', type=int, metavar='N',
        help='calls per quantized graph (default: 50 to 500, as in the paper)')  # fmt: skip
    add('--seed', type=int, default=0,
        help='seed of the noise of recorded videos, 0 to 4294967295 (default: %(default)s)')  # fmt: skip


def _add_graphs(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add('--soc', default='sm8750', metavar='LIST',
        help='comma-separated chipsets; the first is simulated (default: %(default)s)')  # fmt: skip
    add('--precision', metavar='LIST', help="comma-separated: w8a16, fp16 (default: each graph's own)")
    add('--ranges', default='minmax', metavar='LIST',
        help='rules for activation ranges: minmax, percentile, mse; the best of several is taken '
        '(default: %(default)s)')  # fmt: skip
    add('--adaround', metavar='PYTHON',
        help='learn the rounding of the weights of video_decoder and super_resolution (AdaRound); PYTHON is the '
        'interpreter of an environment with aimet-onnx; takes minutes per graph')  # fmt: skip
    add('--adaround-iterations', type=int, default=1000, metavar='N', help='iterations per layer '
        '(default: %(default)s)')  # fmt: skip
    add('--two-parts', action=argparse.BooleanOptionalAction, default=True,
        help='store weights of convolutional graphs in two parts of 8 bits where the target needs it; the search runs '
        'a graph about twenty times, up to half a minute each at full size')  # fmt: skip
    add('--separate-contexts', action='store_true',
        help='compile one binary per stage of the denoiser instead of one for all; takes less memory, and the '
        'simulator can load them')  # fmt: skip


def _add_measurements(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add('--evaluation-samples', type=int, default=3, metavar='N',
        help='calls per graph and evaluation prompt that run on the CPU, at most 8 (default: %(default)s)')  # fmt: skip
    add('--simulate', action=argparse.BooleanOptionalAction, default=True,
        help='run the binaries on the HTP simulator; takes minutes per call at full size')  # fmt: skip
    add('--simulated-samples', type=int, default=2, metavar='N',
        help='calls per graph that run on the simulator: those with the lowest SNR on the CPU (default: '
        '%(default)s)')  # fmt: skip
    add('--whole-video', action=argparse.BooleanOptionalAction, default=True,
        help='generate whole videos with the exported graphs on the CPU, if all stages of the denoiser are exported; '
        'takes many minutes per video at full size; without them, the bits of keys and values are chosen on single '
        'calls alone')  # fmt: skip
    add('--whole-videos', type=int, metavar='N', help='number of whole videos (default: one per evaluation prompt)')
    add('--simulate-video', action='store_true', help='generate them on the simulator, too')
    add('--compare', action='store_true',
        help='compare the last stage of the denoiser with a straightforward export, and the shared binary with '
        'separate ones; all of them are compiled')  # fmt: skip
    add('--allow-below-target', action='store_true', help='exit with 0 even if a graph misses its target')


def run(args: argparse.Namespace) -> Report:
    """Export everything that a command line asks for; return the report, which is also written.

    Raises:
      InputError: an option or an input is wrong.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'{", ".join(missing)}: not installed. Run: pip install -e ".[export]" (x86-64 Linux).')
    _check_numbers(args)
    options = make_options(args)
    # JAX and the models take seconds to import: wrong input is reported before.
    from export.steps import run as steps

    return steps.run(options)


def make_options(args: argparse.Namespace) -> ExportOptions:
    """Return the options of a command line; the checkpoint's generation.json sets those that it leaves open.

    Raises:
      InputError: an option or an input is wrong.
    """
    from export.qnn.chipsets import find_targets

    find_targets(args.soc)  # before anything slow
    _check_out(args.out)
    check_writable(args.out)
    defaults = generation.read(args.checkpoint)
    mode = args.mode or defaults.mode
    needed = hub.needed_folders(mode, args.first_frame or defaults.of(mode).first_frame)
    root = shipped.find(args.checkpoint, needed)
    from export.host.denoiser_choice import choose_denoiser
    from export.host.denoiser_graphs import check_denoiser
    from export.host.modules import select
    from export.host.phone_program import available
    from export.host.prompts import choose_prompts
    from export.steps.options import ExportOptions

    counts = (args.validation_prompts, args.evaluation_prompts)
    prompts = choose_prompts(root, args.prompts_file, args.evaluation_prompts_file, *counts)
    chosen = choose_denoiser(root, mode, defaults, args.student, args.denoiser, args.adapter)
    program = _program(args, root, mode, chosen)
    check_denoiser(chosen.denoiser)
    names = select(args.graphs, available(program))
    _print_cut_prompts(root, defaults, prompts)
    return ExportOptions(
        program=program,
        denoiser=chosen.denoiser,
        names=names,
        graphs=_graph_options(args, names),
        calibration=args.calibration or args.out / 'calibration',
        **_scenes(args, defaults, program, prompts),
        videos=args.prompts,
        whole_videos=args.whole_videos or args.evaluation_prompts,
        whole_video=args.whole_video,
        simulate_video=args.simulate_video,
    )


def _print_cut_prompts(root: pathlib.Path, defaults: GenerationDefaults, prompts: PromptLists) -> None:
    """Print a line if prompts have more tokens than the text encoder takes."""
    from neodragon_jax.checkpoint import components as checkpoint
    from neodragon_jax.checkpoint import folders
    from neodragon_jax.generation.tokens import T5Tokenizer, cut_notice

    tokenizer = T5Tokenizer.load(checkpoint.component_folder(root, folders.T5_TOKENIZER))
    every = [*prompts.calibration, *prompts.validation, *prompts.evaluation]
    notice = cut_notice(tokenizer, every, defaults.prompt_modifier)
    print(notice, end='\n' if notice else '')


def _scenes(
    args: argparse.Namespace, defaults: GenerationDefaults, program: ProgramOptions, prompts: PromptLists
) -> dict[str, Scenes]:
    """Return what the videos of the calibration set show, by field of ExportOptions."""
    from export.host.recording import Scenes
    from neodragon_jax.base import video

    images = [video.picture_to_frame(video.read_image(path), *program.size) for path in args.image]
    texts = (defaults.prompt_modifier, defaults.negative_prompt, images, args.seed)
    lists = {'scenes': prompts.calibration, 'validation': prompts.validation, 'evaluation': prompts.evaluation}
    # The first evaluation video is the bundle's, which a player without JAX makes again.
    return {field: Scenes(listed, *texts, portable=field == 'evaluation') for field, listed in lists.items()}


def _program(args: argparse.Namespace, root: pathlib.Path, mode: str, chosen: DenoiserChoice) -> ProgramOptions:
    """Return the program to export."""
    from export.host.modules import ProgramOptions

    defaults, frames = chosen.defaults, args.frames or chosen.defaults.frames
    height, width = args.height or defaults.height, args.width or defaults.width
    plan = make_plan(mode, frames, height, width, args.steps, defaults=defaults.of(mode))
    first_frame = generation.choose_first_frame(args.first_frame, mode, defaults, picture=bool(args.image))
    return ProgramOptions(root, mode, plan, chosen.adapter, args.upscale, first_frame, images=bool(args.image))


def _graph_options(args: argparse.Namespace, names: Sequence[str]) -> GraphOptions:
    """Return how graphs are made.

    Raises:
      InputError: a list has an unknown entry, or --adaround is given without a graph that it applies to.
    """
    from export.qnn.chipsets import find_targets
    from export.qnn.compile import PRECISIONS
    from export.quantize import adaround
    from export.quantize.ranges import METHODS
    from export.steps.options import GraphOptions

    if args.adaround is not None and not set(adaround.GRAPHS) & set(names):
        raise InputError(
            f'--adaround applies to {" and ".join(adaround.GRAPHS)}, neither of which is exported here; leave it out, '
            'or add one to --graphs (super_resolution needs --upscale).'
        )
    return GraphOptions(
        out=args.out,
        targets=find_targets(args.soc),
        precisions=args.precision and known_entries('--precision', args.precision.lower(), PRECISIONS),
        ranges=known_entries('--ranges', args.ranges.lower(), METHODS),
        adaround=args.adaround and adaround.find(args.adaround, args.adaround_iterations),
        two_parts=args.two_parts,
        calibration_samples=args.calibration_samples,
        evaluation_samples=args.evaluation_samples,
        simulated_samples=args.simulated_samples,
        simulate=args.simulate,
        separate_contexts=args.separate_contexts,
        compare=args.compare,
    )


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise InputError if a number is out of range."""
    from export.host.recording import EVALUATION_CALLS

    counts = ('calibration_samples', 'evaluation_samples', 'simulated_samples', 'prompts', 'evaluation_prompts')
    for option in (*counts, 'validation_prompts', 'whole_videos', 'adaround_iterations', 'frames', 'height', 'width'):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise InputError(f'--{option.replace("_", "-")} is {value}; give at least 1.')
    check_seed(args.seed)
    if args.evaluation_samples > EVALUATION_CALLS:
        raise InputError(f'--evaluation-samples is {args.evaluation_samples}; a video keeps {EVALUATION_CALLS} calls.')


def _check_out(out: pathlib.Path) -> None:
    """Raise InputError if the output folder lies in one of the project's own packages."""
    resolved = out.resolve()
    for package in ('export', 'neodragon_jax', 'train', 'configs', 'tests'):
        folder = _SOURCE / package
        if resolved == folder or folder in resolved.parents:
            raise InputError(f'--out {out}: a folder of the source code. Choose another, such as phone/.')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: _status(parse_args(argv)))


def _status(args: argparse.Namespace) -> int:
    """Export and print the warnings; return 1 if a graph misses its target, else 0."""
    report = run(args)
    print(args.out / 'report.md')
    for line in report.warnings:
        print(f'warning: {line}', file=sys.stderr)
    if report.not_measured:
        print(f'not measured: {", ".join(report.not_measured)} (see --simulate)', file=sys.stderr)
    for line in report.below_target:
        print(f'below target: {line}', file=sys.stderr)
    return 1 if report.below_target and not args.allow_below_target else 0


if __name__ == '__main__':
    sys.exit(main())
