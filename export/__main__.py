"""Command line: a denoiser checkpoint in, Snapdragon context binaries and a report out. See `--help`."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from neodragon_jax.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from export.build import Exported
    from export.calibration import Recording, Video
    from export.compile_qnn import Target
    from export.graphs import DenoiserHost
    from export.report import Report, VideoRow
    from neodragon_jax.models.mmdit import PyramidMMDiT
    from neodragon_jax.sampler import Plan

# What runs the graphs of a whole generation.
CPU = 'CPU'
SIMULATOR = 'HTP simulator'

EXAMPLES = """
examples:
  the released few-step denoiser for Snapdragon 8 Elite, calibrated on first frames of your own:
    python -m export --checkpoint CKPT --soc sm8750 --image dog.jpg --image street.jpg --out export/

  a distilled student, W8A16 only, without the simulator:
    python -m export --checkpoint CKPT --denoiser RUN/student/diffusion_transformer_320p \\
        --adapter RUN/student/context_adapter --precision w8a16 --no-simulate --out export/

exit status: 0 done, 1 a graph is below its target, 2 wrong input
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        'python -m export',
        description='Export the three denoiser stages: JAX to ONNX, quantised on recorded generations, compiled to QNN '
        'context binaries, run on the HTP simulator, and compared with JAX in float32.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--checkpoint', required=True, metavar='DIR', help='root of a checkpoint in the released layout')
    add('--out', required=True, metavar='DIR',
        help='folder for {graph}-{runtime}-{precision}-{chipset}/, report.md and report.json')  # fmt: skip
    add('--denoiser', metavar='DIR', help="denoiser folder to export instead of the checkpoint's")
    add('--adapter', metavar='DIR', help="context adapter folder to use instead of the checkpoint's")
    add('--mode', choices=('hybrid', 'monolithic'), default='hybrid',
        help='which denoiser of the checkpoint, and how calibration generates (default: %(default)s)')  # fmt: skip
    add('--soc', default='sm8750', metavar='NAME', help='chipset (default: %(default)s)')
    add('--precision', default='w8a16,fp16', metavar='LIST', help='comma-separated: w8a16, fp16 (default: %(default)s)')
    add('--frames', type=int, default=49, metavar='N', help='video frames, 8 n + 1 (default: %(default)s)')
    add('--height', type=int, default=320, metavar='PX', help='default: %(default)s')
    add('--width', type=int, default=512, metavar='PX', help='default: %(default)s')
    add('--steps', type=int, nargs=3, metavar='N', help="steps per stage in calibration (default: the mode's)")
    add('--prompts-file', metavar='FILE', help='calibration prompts, one per line (default: eight built-in ones)')
    add('--image', action='append', default=[], metavar='FILE',
        help='first frame for calibration; may be repeated (default: the denoiser draws unit 0 as well)')  # fmt: skip
    add('--calibration-samples', type=int, metavar='N', help='per graph (default: 300)')
    add('--evaluation-samples', type=int, default=2, metavar='N',
        help='per graph; each is one run of the simulator (default: %(default)s)')  # fmt: skip
    add('--simulate', action=argparse.BooleanOptionalAction, default=True,
        help='run the binaries on the HTP simulator (minutes per run at full size)')  # fmt: skip
    add('--simulate-video', action='store_true', help='run one whole generation on the simulator, too')
    add('--allow-below-target', action='store_true', help='exit with 0 even if a graph misses its target')
    add('--seed', type=int, default=0, help='of calibration noise (default: %(default)s)')
    return parser.parse_args(argv)


def read_precisions(text: str) -> list[str]:
    """Return the precisions of a comma-separated list."""
    from export.compile_qnn import PRECISIONS

    names = [name.strip().lower() for name in text.split(',') if name.strip()]
    for name in names:
        if name not in PRECISIONS:
            raise InputError(
                f'--precision has {name!r}.{did_you_mean(name, PRECISIONS)} Use one or more of {", ".join(PRECISIONS)}.'
            )
    if not names:
        raise InputError(f'--precision is empty; use one or more of {", ".join(PRECISIONS)}.')
    return list(dict.fromkeys(names))


def read_prompts(path: str | None) -> Sequence[str]:
    """Return the lines of a prompts file, or the built-in prompts."""
    from export.calibration import PROMPTS

    if path is None:
        return PROMPTS
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
    from export.compile_qnn import find_target

    target, precisions = find_target(args.soc), read_precisions(args.precision)
    prompts = read_prompts(args.prompts_file)
    for option in ('calibration_samples', 'evaluation_samples'):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise InputError(f'--{option.replace("_", "-")} is {getattr(args, option)}; give at least 1.')
    # Only now: JAX and the models take seconds to import, and the checks above should answer at once.
    import jax

    # The reference is float32 on accelerators too.
    with jax.default_matmul_precision('highest'):
        return _export(args, target, precisions, prompts)


def _export(args: argparse.Namespace, target: Target, precisions: Sequence[str], prompts: Sequence[str]) -> Report:
    """Record, then export and measure graph by graph."""
    from export import build, calibration
    from export.graphs import DEPLOYMENTS, DenoiserHost, denoiser_graphs
    from export.report import Report
    from neodragon_jax import pipeline
    from neodragon_jax.tokens import T5_LENGTH

    plan = pipeline.make_plan(args.mode, args.frames, args.height, args.width, args.steps)
    folder, model, params = _load(args)
    counts = [0] * plan.schedule.stages
    if 'w8a16' in precisions:
        rows_of_stages = [DEPLOYMENTS[f'denoiser_stage{stage}'] for stage in range(plan.schedule.stages)]
        counts = [args.calibration_samples or row.calibration_samples for row in rows_of_stages]
    videos = calibration.videos_needed(plan, counts, first_frame=bool(args.image))
    whole = _whole_videos(args, precisions)
    progress = Progress(videos + len(counts) * (2 + 3 * len(precisions)) + len(whole))
    recording = _record(args, plan, folder, prompts, counts, lambda i: progress(f'recorded video {i + 1} of {videos}'))

    grid = (plan.height // model.config.patch_size, plan.width // model.config.patch_size)
    graphs = denoiser_graphs(model, params, plan.frames - 1, grid, T5_LENGTH, plan.schedule.stages)
    host = DenoiserHost(model, params)
    size = {'frames': args.frames, 'height': args.height, 'width': args.width}
    source = build.fingerprint(folder, recording.calibration, **size)
    out, exported, rows = pathlib.Path(args.out), [], []
    for stage, graph in enumerate(graphs):
        feeds = lambda stage=stage: build.graph_feeds(host, recording.calibration[stage])
        exported.append(build.export_graph(graph, out, target, precisions, feeds, source, progress))
        samples = calibration.spread(recording.evaluation.samples[stage], args.evaluation_samples)
        rows += build.measure(exported[-1], host, samples, target, args.simulate, progress)
    generations = [_generate(*how, host, exported, target, recording.evaluation, plan, progress) for how in whole]
    progress.close()
    counted = {'calibration_samples': counts, 'evaluation_samples': args.evaluation_samples}
    report = Report(rows, generations, {'chipset': target.product, 'mode': args.mode, **counted, **source})
    report.write(out)
    return report


def _load(args: argparse.Namespace) -> tuple[pathlib.Path, PyramidMMDiT, dict[str, Any]]:
    """Return the denoiser's folder, module and parameters."""
    from neodragon_jax import checkpoint, pipeline
    from neodragon_jax.models.mmdit import PyramidMMDiT

    folder = args.denoiser or checkpoint.component_folder(args.checkpoint, pipeline.DENOISER_FOLDERS[args.mode])
    model, params = checkpoint.load(folder)
    if not isinstance(model, PyramidMMDiT):
        raise InputError(f'{folder}: holds a {type(model).__name__}; pass the folder of a PyramidMMDiT.')
    return pathlib.Path(folder), model, params


def _record(
    args: argparse.Namespace,
    plan: Plan,
    denoiser: pathlib.Path,
    prompts: Sequence[str],
    counts: Sequence[int],
    on_video: Callable[[int], None],
) -> Recording:
    """Run the real program in JAX; its components leave memory when this returns."""
    import jax.numpy as jnp

    from export.calibration import Scenes, record
    from neodragon_jax import pipeline, video
    from neodragon_jax.tokens import DEFAULT_MODIFIER, DEFAULT_NEGATIVE_PROMPT

    images = [video.image_to_frame(video.read_image(path), args.height, args.width) for path in args.image]
    components = pipeline.load(args.checkpoint, args.mode, denoiser, args.adapter, dtype=jnp.float32)
    scenes = Scenes(prompts, DEFAULT_MODIFIER, DEFAULT_NEGATIVE_PROMPT, images, args.seed)
    return record(components, components.check(plan), scenes, counts, on_video)


def _whole_videos(args: argparse.Namespace, precisions: Sequence[str]) -> list[tuple[str, str]]:
    """Return what the evaluation video is generated with: (precision, runner)."""
    on_cpu = [('w8a16', CPU)] if 'w8a16' in precisions else []
    return on_cpu + [(precision, SIMULATOR) for precision in precisions if args.simulate_video]


def _generate(
    precision: str,
    runner: str,
    host: DenoiserHost,
    exported: Sequence[Exported],
    target: Target,
    video: Video,
    plan: Plan,
    on_step: Callable[[str], None],
) -> VideoRow:
    """Generate the evaluation video with the exported graphs, under the same sampler."""
    from export.compile_qnn import provider_options
    from export.htp import HtpSession
    from export.report import VideoRow, snr_db
    from export.runtime import GraphDenoiser, OnnxSession

    with contextlib.ExitStack() as sessions:
        if runner == SIMULATOR:
            options = provider_options(target, precision)
            runners = [sessions.enter_context(HtpSession(graph.wrappers[precision], options)) for graph in exported]
        else:
            runners = [OnnxSession(graph.precise[precision]) for graph in exported]
        latents = video.replay(GraphDenoiser(host, runners), plan)
    row = VideoRow(precision, runner, snr_db(video.latents[:, video.generated], latents[:, video.generated]))
    on_step(f'whole video, {precision} on the {runner}: {row.latents_db:.1f} dB')
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = parse_args(argv)
    try:
        report = run(args)
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(pathlib.Path(args.out) / 'report.md')
    for line in report.below_target:
        print(f'below target: {line}', file=sys.stderr)
    return 1 if report.below_target and not args.allow_below_target else 0


if __name__ == '__main__':
    sys.exit(main())
