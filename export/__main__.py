"""Command line: a checkpoint in, Snapdragon context binaries of every module and a report out. See `--help`."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib.util
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from neodragon_jax.base.errors import InputError, did_you_mean
from neodragon_jax.checkpoint import shipped
from neodragon_jax.checkpoint.folders import DENOISER_FOLDERS
from neodragon_jax.generation import defaults as generation
from neodragon_jax.generation.defaults import RELEASED

if TYPE_CHECKING:
    from export.host.calibration_set import Dataset, Protocol
    from export.host.recording import Scenes
    from export.report.report import Report
    from export.steps.graph import Settings
    from export.steps.workshop import Workshop

PACKAGES = ('jax2onnx', 'onnx', 'onnxruntime', 'onnxruntime_qnn')

EXAMPLES = """
examples:
  the whole released system for two chipsets, calibrated on 50 generated videos:
    python -m export --checkpoint CKPT --soc sm8750,sc8380xp --prompts 50 --out export/

  a distilled student's denoiser, W8A16 and FP16, calibrated on first frames of your own, without the simulator:
    python -m export --checkpoint CKPT --denoiser RUN/student/diffusion_transformer_320p \\
        --adapter RUN/student/context_adapter --graphs denoiser --precision w8a16,fp16 --image dog.jpg \\
        --no-simulate --out export/

  the video decoder alone, with three rules for the ranges of activations compared:
    python -m export --checkpoint CKPT --graphs video_decoder --ranges minmax,percentile,mse --out export/

Every step skips itself when its result is there and current, so that the same command goes on where it was stopped.
exit status: 0 done, 1 a graph is below its target, 2 wrong input
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        'python -m export',
        description='Export the modules of a checkpoint: JAX to ONNX, quantized on recorded generations, compiled to '
        'QNN context binaries, run on the HTP simulator, and compared with JAX in float32.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--checkpoint', required=True, metavar='DIR|NAME',
        help='root of a checkpoint in the released layout, or the name of one that is installed')  # fmt: skip
    add('--out', required=True, metavar='DIR',
        help='folder for {graph}-{runtime}-{precision}-{chipset}/, calibration/ and report.*')  # fmt: skip
    add('--graphs', metavar='LIST',
        help='comma-separated graphs, or beginnings such as "denoiser" and "first_frame" (default: all)')  # fmt: skip
    add('--denoiser', metavar='DIR', help="denoiser folder to export instead of the checkpoint's")
    add('--adapter', metavar='DIR', help="context adapter folder to use instead of the checkpoint's")
    add('--upscale', metavar='DIR', help='folder of a QuickSRNet; exports super_resolution too')
    own = "default: as in the checkpoint's generation.json, without it %s"
    add('--mode', choices=generation.MODES,
        help=f'which denoiser of the checkpoint, and how calibration generates ({own % RELEASED.mode})')  # fmt: skip
    add('--first-frame', choices=generation.FIRST_FRAMES,
        help='who makes the first frame in hybrid mode, without --image: the first-frame model, whose graphs are then '
        f'exported too, or the few-step denoiser ({own % RELEASED.hybrid.first_frame})')  # fmt: skip
    add('--soc', default='sm8750', metavar='LIST',
        help='comma-separated chipsets; the first is simulated (default: %(default)s)')  # fmt: skip
    add('--precision', metavar='LIST', help="comma-separated: w8a16, fp16 (default: each graph's own)")
    add('--frames', type=int, metavar='N', help=f'video frames, 8 n + 1 ({own % RELEASED.frames})')
    add('--height', type=int, metavar='PX', help=own % RELEASED.height)
    add('--width', type=int, metavar='PX', help=own % RELEASED.width)
    add('--steps', type=int, nargs=3, metavar='N', help="steps per stage in calibration (default: the mode's)")
    add('--calibration', metavar='DIR', help='calibration set to make or use again (default: OUT/calibration)')
    add('--prompts', type=int, metavar='N',
        help='videos to record, one prompt each (default: as many as the calibration samples take)')  # fmt: skip
    add(
        '--prompts-file',
        metavar='FILE',
        help="calibration prompts, one per line (default: eight built-in ones, or the example of the checkpoint's "
        'generation.json)',
    )
    add('--image', action='append', default=[], metavar='FILE',
        help='first frame for calibration; may be repeated (default: drawn from the prompt)')  # fmt: skip
    add('--calibration-samples', type=int, metavar='N', help='per quantized graph (default: 50 to 500, as the paper)')
    add('--ranges', default='minmax', metavar='LIST',
        help='rules for the ranges of activations: minmax, percentile, mse; of several the best is taken '
        '(default: %(default)s)')  # fmt: skip
    add('--adaround', metavar='PYTHON',
        help='learn how to round the weights of video_decoder and super_resolution (AdaRound), with the interpreter of '
        'an environment that has aimet-onnx; minutes per graph at the least')  # fmt: skip
    add('--adaround-iterations', type=int, default=1000, metavar='N', help='of each layer (default: %(default)s)')
    add('--two-parts', action=argparse.BooleanOptionalAction, default=True,
        help='let weights of convolutional graphs take two parts of 8 bits where the target needs it; the search for '
        'them runs a graph twenty times or so, up to half a minute each at full size')  # fmt: skip
    add('--separate-contexts', action='store_true',
        help='one binary per stage of the denoiser, not one for all stages with the weights stored once; takes less '
        'memory to compile, and the simulator can load them')  # fmt: skip
    add('--compare', action='store_true',
        help='report the last stage of the denoiser against a straightforward export of it, and the shared binary '
        'against separate ones; compiles all of them')  # fmt: skip
    add('--evaluation-samples', type=int, default=2, metavar='N',
        help='per graph, at most 8; each is one run of the simulator (default: %(default)s)')  # fmt: skip
    add('--simulate', action=argparse.BooleanOptionalAction, default=True,
        help='run the binaries on the HTP simulator (minutes per run at full size)')  # fmt: skip
    add('--whole-video', action=argparse.BooleanOptionalAction, default=True,
        help='generate one video with the exported graphs on the CPU, too, if the whole denoiser is among them (many '
        'minutes at full size)')  # fmt: skip
    add('--simulate-video', action='store_true', help='run one whole generation on the simulator, too')
    add('--allow-below-target', action='store_true', help='exit with 0 even if a graph misses its target')
    add('--seed', type=int, default=0, help='of calibration noise (default: %(default)s)')
    return parser.parse_args(argv)


def read_list(option: str, text: str, known: Sequence[str]) -> list[str]:
    """Return the entries of a comma-separated list, each once.

    Raises:
      InputError: an entry is unknown, or there is none.
    """
    names = [name.strip().lower() for name in text.split(',') if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(
                f'{option} has {name!r}.{did_you_mean(name, known)} Use one or more of {", ".join(known)}.'
            )
    if not names:
        raise InputError(f'{option} is empty; use one or more of {", ".join(known)}.')
    return list(dict.fromkeys(names))


def read_prompts(path: str | None, example: str = '') -> Sequence[str]:
    """Return the lines of a prompts file; without one the checkpoint's example, or the built-in prompts."""
    from export.host.recording import PROMPTS

    if path is None:
        return [example] if example else PROMPTS
    if not pathlib.Path(path).is_file():
        raise InputError(f'--prompts-file {path}: no such file. Give a text file with one prompt per line.')
    try:
        lines = [line.strip() for line in pathlib.Path(path).read_text(encoding='utf-8').splitlines()]
    except UnicodeDecodeError:
        raise InputError(f'--prompts-file {path}: not UTF-8 text. Save it as UTF-8, one prompt per line.') from None
    if not any(lines):
        raise InputError(f'--prompts-file {path}: empty. Write one prompt per line.')
    return [line for line in lines if line]


class Progress:
    """A bar on a terminal, one line per step elsewhere."""

    def __init__(self, total: int) -> None:
        import tqdm

        self._bar = tqdm.tqdm(total=total, unit='step', disable=not sys.stderr.isatty())
        self._total, self._done = total, 0

    def __call__(self, text: str) -> None:
        """Say that a step is done."""
        self._done += 1
        if self._bar.disable:
            print(f'[{self._done}/{self._total}] {text}', flush=True)
        else:
            self._bar.set_description(text)
            self._bar.update()

    def close(self) -> None:
        """Leave the terminal in order."""
        self._bar.close()


def run(args: argparse.Namespace) -> Report:
    """Export everything a command line asks for; return the report, which is also written."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'{", ".join(missing)}: not installed. Run: pip install -e ".[export]" (x86-64 Linux).')
    from export.qnn.compile import find_targets

    find_targets(args.soc)
    _check_numbers(args)
    args = _settled(args)
    # Only now: JAX and the models take seconds to import, and the checks above should answer at once.
    import jax

    # The reference is float32 on accelerators too.
    with jax.default_matmul_precision('highest'):
        return _export(args, read_prompts(args.prompts_file, args.defaults.example))


def _settled(args: argparse.Namespace) -> argparse.Namespace:
    """Return a command line with what it leaves open chosen by the checkpoint's generation.json.

    Raises:
      InputError: there is no such checkpoint, or that file is damaged; or --adaround names nothing that has aimet-onnx.
    """
    from export.quantize import adaround

    settled = argparse.Namespace(**vars(args))
    settled.checkpoint = shipped.find(args.checkpoint)
    defaults = generation.read(settled.checkpoint)
    for name in ('mode', 'frames', 'height', 'width'):
        if getattr(args, name) is None:
            setattr(settled, name, getattr(defaults, name))
    settled.first_frame = generation.choose_first_frame(args.first_frame, settled.mode, defaults)
    settled.defaults = defaults
    if args.adaround is not None:
        settled.adaround = adaround.find(args.adaround, args.adaround_iterations)
    return settled


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise InputError if a count is out of range."""
    for option in ('calibration_samples', 'evaluation_samples', 'prompts'):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise InputError(f'--{option.replace("_", "-")} is {value}; give at least 1.')


def _export(args: argparse.Namespace, prompts: Sequence[str]) -> Report:
    """Record, then export and measure graph by graph."""
    from export.host.calibration_set import Dataset
    from export.report.report import Report
    from export.steps import comparison as straightforward
    from export.steps import graph as build
    from export.steps import shared_binary as shared
    from export.steps import whole_video

    workshop = _workshop(args)
    if args.compare:
        straightforward.check(workshop.names, workshop.subject)
    scenes = _scenes(args, prompts)
    counts = _counts(args, workshop)
    protocol = _protocol(args, workshop, scenes, counts)
    settings = _settings(args, workshop, counts)
    whole = whole_video.planned(workshop, args.whole_video, args.simulate_video)
    steps = sum(build.steps_of(name, settings) for name in workshop.names) + shared.steps_of(settings)
    steps += straightforward.GRAPHS * args.compare
    progress = Progress(protocol.videos + 1 + steps + len(whole))
    folder = pathlib.Path(args.calibration or settings.out / 'calibration')
    dataset = Dataset.record(folder, protocol, workshop.open_recording, progress)
    settings = dataclasses.replace(settings, calibration_sha256=dataset.sha256)
    exported, rows, binaries = [], [], []
    for task in workshop.tasks(dataset, counts, args.evaluation_samples):
        exported.append(build.export_graph(task, settings, progress))
        ready = exported[-1:]
        if task.name in settings.shared:  # the last one waits for no other
            ready = [graph for graph in exported if graph.task.name in settings.shared]
            if len(ready) < len(settings.shared):
                continue
            binaries = shared.compile_stages(ready, settings, progress)
        for graph in ready:
            rows += build.measure(graph, settings, progress)
    comparison = straightforward.compare(workshop.subject, settings, progress) if args.compare else []
    videos = []
    for graphs, runner in whole:
        videos.append(whole_video.generate(graphs, runner, workshop, exported, settings, dataset))
        progress(f'whole video, {graphs} on the {runner}: {videos[-1].latents_db:.1f} dB')
    progress.close()
    made_from = _made_from(args, workshop, dataset, counts)
    report = Report(rows, videos, made_from, binaries, comparison, dataset.spent)
    report.write(settings.out)
    return report


def _workshop(args: argparse.Namespace) -> Workshop:
    """Return what a command line exports.

    Raises:
      InputError: a component is missing or of another kind, or a graph is unknown.
    """
    from export.host import modules
    from export.steps import workshop as tasks
    from neodragon_jax.checkpoint import components as checkpoint
    from neodragon_jax.generation import pipeline

    own = args.defaults.of(args.mode)
    plan = pipeline.make_plan(args.mode, args.frames, args.height, args.width, args.steps, defaults=own)
    denoiser = args.denoiser or checkpoint.component_folder(args.checkpoint, DENOISER_FOLDERS[args.mode])
    tasks.check_denoiser(pathlib.Path(denoiser))
    made_of = (args.checkpoint, args.mode, plan, args.adapter, args.upscale)
    source = modules.Source(*made_of, first_frame=args.first_frame, images=bool(args.image))
    names = modules.select(args.graphs, tasks.available(source))
    return tasks.Workshop(source, pathlib.Path(denoiser), names)


def _scenes(args: argparse.Namespace, prompts: Sequence[str]) -> Scenes:
    """Return what calibration generates."""
    from export.host.recording import Scenes
    from neodragon_jax.base import video

    images = [video.image_to_frame(video.read_image(path), args.height, args.width) for path in args.image]
    return Scenes(prompts, args.defaults.prompt_modifier, args.defaults.negative_prompt, images, args.seed)


def _counts(args: argparse.Namespace, workshop: Workshop) -> dict[str, int]:
    """Return the calibration samples of every graph; none for those that are not quantized."""
    from export.graphs.table import DEPLOYMENTS
    from export.qnn.compile import PRECISIONS

    precisions = args.precision and read_list('--precision', args.precision, PRECISIONS)
    counts = {}
    for name in workshop.names:
        quantized = 'w8a16' in (precisions or [DEPLOYMENTS[name].precision])
        wanted = args.calibration_samples or DEPLOYMENTS[name].calibration_samples or 50
        counts[name] = wanted if quantized else 0
    return counts


def _protocol(args: argparse.Namespace, workshop: Workshop, scenes: Scenes, counts: Mapping[str, int]) -> Protocol:
    """Return how calibration is recorded: as many videos as the counts take, or as many as the user says."""
    from export.host.calibration_set import Protocol
    from export.host.recording import videos_needed

    recorded = {name: counts.get(name, 0) for name in workshop.calls}
    videos = args.prompts or videos_needed(workshop.calls, recorded)
    keep = {name: min(workshop.calls[name], -(-count // max(videos, 1))) for name, count in recorded.items()}
    return Protocol(workshop.weights, scenes, workshop.source.plan, keep, videos if any(keep.values()) else 0)


def _settings(args: argparse.Namespace, workshop: Workshop, counts: Mapping[str, int]) -> Settings:
    """Return how graphs are exported.

    Raises:
      InputError: --adaround without a graph that it is for.
    """
    from export.graphs.table import DENOISER
    from export.qnn.compile import PRECISIONS, find_targets
    from export.quantize.adaround import GRAPHS as ADAROUND_GRAPHS
    from export.quantize.ranges import METHODS
    from export.steps.graph import Settings

    if args.adaround is not None and not set(ADAROUND_GRAPHS) & set(workshop.names):
        raise InputError(
            f'--adaround is for {" and ".join(ADAROUND_GRAPHS)}, neither of which is exported here; leave it out, or '
            'add one to --graphs (super_resolution needs --upscale).'
        )
    stages = [name for name in workshop.names if name.startswith(DENOISER)]
    return Settings(
        out=pathlib.Path(args.out),
        targets=find_targets(args.soc),
        precisions=args.precision and read_list('--precision', args.precision, PRECISIONS),
        ranges=read_list('--ranges', args.ranges, METHODS),
        adaround=args.adaround,
        two_parts=args.two_parts,
        calibration_sha256='',
        calibration_samples=dict(counts),
        evaluation_samples=args.evaluation_samples,
        simulate=args.simulate,
        shared=stages if len(stages) > 1 and not args.separate_contexts else [],
        compare=args.compare,
    )


def _made_from(
    args: argparse.Namespace, workshop: Workshop, dataset: Dataset, counts: Mapping[str, int]
) -> dict[str, object]:
    """Return what the report says that it was made from."""
    from export.steps.graph import makers

    return {
        'checkpoint': str(args.checkpoint),
        'mode': args.mode,
        'chipsets': args.soc,
        'frames': args.frames,
        'height': args.height,
        'width': args.width,
        'weights_sha256': {name: digest for name, digest in workshop.weights.items()},
        'calibration_sha256': dataset.sha256,
        'calibration_videos': dataset.protocol.videos,
        'calibration_samples': dict(counts),
        'evaluation_samples': args.evaluation_samples,
        **makers(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = parse_args(argv)
    try:
        report = run(args)
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f'error: {args.out}: no space left on the device. Free some, or choose another --out; '
            'what is finished is kept, and the same command goes on from there.',
            file=sys.stderr,
        )
        return 2
    print(pathlib.Path(args.out) / 'report.md')
    for line in report.below_target:
        print(f'below target: {line}', file=sys.stderr)
    return 1 if report.below_target and not args.allow_below_target else 0


if __name__ == '__main__':
    sys.exit(main())
