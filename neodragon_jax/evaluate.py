"""Numbers for a folder of generated videos, and VBench where it is installed. Run with --help.

The folder has VBench's layout, `{prompt}-{i}.mp4`, as `python -m neodragon_jax` writes it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from neodragon_jax.base.atomic import atomic_file, check_file_writable, check_writable
from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.progress import ProgressBar
from neodragon_jax.evaluation.clip_metrics import ClipMetrics, markdown_table, mean_metrics, measure
from neodragon_jax.evaluation.vbench import MODES, find_vbench, run_vbench

EXAMPLES = """
motion (px/frame), flicker and sharpness (gray levels), saturation (0..1) need no weights and no reference; their
formulas are in neodragon_jax/evaluation/clip_metrics.py.

examples:
  python -m neodragon_jax.evaluate out/ --json out/metrics.json
  python -m neodragon_jax.evaluate out/ --vbench ~/vbench/bin/vbench --vbench-out scores/

VBench needs a GPU and other versions of common packages than this project, so it needs a separate environment:
  python3 -m venv ~/vbench && ~/vbench/bin/pip install vbench
Some of its dimensions also need detectron2; see its own instructions. The videos for it are made by
  python -m neodragon_jax --vbench ~/vbench/bin/vbench --checkpoint CKPT --no-safety-checker --out out/
"""

_NAME = re.compile(r'.+-\d+')


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Options of this command; VBench runs if `vbench` names its program."""

    videos: pathlib.Path
    json: pathlib.Path | None
    vbench: str | None
    vbench_out: pathlib.Path
    vbench_mode: str
    vbench_dimensions: Sequence[str] | None


class Evaluation(NamedTuple):
    """Metrics of the clips of a folder by file name, and why others have none."""

    clips: dict[str, ClipMetrics]
    unreadable: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file that --json writes."""
        clips = {name: metrics._asdict() for name, metrics in self.clips.items()}
        mean = mean_metrics(self.clips)._asdict() if self.clips else None
        return {'clips': clips, 'mean': mean, 'unreadable': self.unreadable}


def parse_options(argv: Sequence[str] | None = None) -> EvaluateOptions:
    """Return the options of a command line."""
    description = 'Print motion, flicker, sharpness and saturation of the videos in a folder.'
    parser = command_parser('python -m neodragon_jax.evaluate', description, EXAMPLES)
    add = parser.add_argument
    add('videos', action=PathOption, metavar='VIDEOS_DIR', help='folder with {prompt}-{i}.mp4')
    add('--json', action=PathOption, metavar='FILE', help='also write the numbers to this file')
    add = parser.add_argument_group('VBench').add_argument
    add('--vbench', nargs='?', const='vbench', metavar='COMMAND',
        help='also run VBench; COMMAND is the program of its environment (default: vbench)')  # fmt: skip
    add('--vbench-out', action=PathOption, default='vbench_results', metavar='DIR',
        help='folder of its results (default: %(default)s)')  # fmt: skip
    add('--vbench-mode', choices=MODES, default='vbench_standard',
        help="vbench_standard for VBench's own prompts, custom_input for others (default: %(default)s)")  # fmt: skip
    add('--vbench-dimensions', nargs='+', metavar='NAME', help='dimensions to measure (default: all of the mode)')
    return EvaluateOptions(**vars(parser.parse_args(argv)))


def evaluate(folder: pathlib.Path) -> Evaluation:
    """Measure every video of a folder; unreadable files are listed, not fatal.

    Raises:
      InputError: there is no such folder, or no video in it.
    """
    # Imported late, so that --help and wrong options answer at once.

    from neodragon_jax.base.video import read_mp4

    if not folder.is_dir():
        raise InputError(f'{folder}: no such folder. Give the folder that `python -m neodragon_jax --out` wrote.')
    paths = sorted(path for path in folder.iterdir() if path.suffix == '.mp4' and not path.name.startswith('.'))
    if not paths:
        raise InputError(f'{folder}: no .mp4 in it. Give the folder that `python -m neodragon_jax --out` wrote.')
    clips, unreadable = {}, {}
    for path in ProgressBar(paths, unit='clip'):
        try:
            if not _NAME.fullmatch(path.stem):
                raise InputError('its name is not {prompt}-{i}.mp4; rename it.')
            clips[path.name] = measure(read_mp4(path))
        except InputError as error:
            unreadable[path.name] = str(error)
    return Evaluation(clips, unreadable)


def run(options: EvaluateOptions) -> None:
    """Measure the videos of a folder, print the numbers and write them."""
    mode, folder = options.vbench_mode, options.videos
    dimensions = options.vbench_dimensions or MODES[mode]
    program = None if options.vbench is None else find_vbench(options.vbench, mode, dimensions)
    if options.json is not None:
        check_file_writable(options.json, '.json')
    if program is not None:
        check_writable(options.vbench_out)
    evaluation = evaluate(folder)
    if evaluation.clips:
        print(markdown_table(evaluation.clips))
    for name, reason in evaluation.unreadable.items():
        print(f'not measured: {name}: {reason}')
    report = evaluation.to_json()
    if program is not None and evaluation.clips:
        videos = [folder / name for name in evaluation.clips]
        report['vbench'] = run_vbench(program, videos, options.vbench_out, mode, dimensions)
        for name, score in report['vbench'].items():
            print(f'vbench {name}: ' + ('no result; see its messages above' if score is None else f'{score:.4f}'))
    if options.json:
        with atomic_file(options.json) as path:
            path.write_text(json.dumps(report, indent=2) + '\n', encoding='utf-8')
    _check_measured(options, report)


def _check_measured(options: EvaluateOptions, report: Mapping[str, Any]) -> None:
    """Raise InputError if nothing was measured, or nothing by VBench."""
    if not report['clips']:
        raise InputError(
            f'{options.videos}: none of its {len(report["unreadable"])} videos could be measured (reasons above). Give '
            'the folder that `python -m neodragon_jax --out` wrote.'
        )
    if 'vbench' in report and all(score is None for score in report['vbench'].values()):
        raise InputError(
            f'--vbench {options.vbench}: no result in any dimension; see its messages above, and install it again.'
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_options(argv)))


if __name__ == '__main__':
    sys.exit(main())
