"""Choose the least important blocks of a denoiser, and remove them.

    python -m train.prune select --denoiser FULL --data LATENTS --out CHOICE --remove 6
    python -m train.prune apply --denoiser FULL --keep CHOICE/keep.json --out PRUNED

`train.pruning` then trains the pruned denoiser. It reads the keep list, so `apply` is only needed to inspect a pruned
denoiser before training. The same command resumes a killed `score` or `select` after its last videos.

Source: Neodragon, arXiv 2511.06055, section on block pruning.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.compile_cache import use_compile_cache
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.output import output_folder
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.fingerprint import fingerprint
from train.data import DTYPES
from train.pruning.keep_list import KEEP, prune, read_keep
from train.pruning.measurement import Sampling, Selection, measure
from train.teacher.denoisers import read_denoiser

EXAMPLES = """
examples:
  the paper's choice, 24 blocks to 18, comparing frames instead of latents:
    python -m train.prune select --denoiser RUN/result/pyramid_flow_dit --data LATENTS --out CHOICE --remove 6 \\
        --decoder CKPT/causal_video_vae

  importance alone, quickly:
    python -m train.prune score --denoiser FULL --data LATENTS --out CHOICE --prompts 8 --samples 1 --steps 2 2 2 \\
        --first-steps 2 2 2

  CHOICE gets importance.json, .txt and .svg; select adds keep.json, which train.pruning reads, and with a decoder
  full.png and pruned.png, the first prompt's video with and without the removed blocks.
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    description = 'Choose blocks of a denoiser to remove, and remove them.'
    parser = command_parser('python -m train.prune', description, EXAMPLES)
    commands = parser.add_subparsers(dest='command', required=True)
    score = commands.add_parser('score', help='measure the importance of every block')
    select = commands.add_parser('select', help='measure the importance, then choose the blocks to remove')
    apply = commands.add_parser('apply', help='write the denoiser with only the kept blocks')
    for command in (score, select, apply):
        command.add_argument(
            '--denoiser', action=PathOption, required=True, metavar='DIR', help='component folder of the full denoiser'
        )
        command.add_argument('--out', action=PathOption, required=True, metavar='DIR', help='folder of the result')
    apply.add_argument(
        '--keep', required=True, metavar='LIST', help='blocks to keep, as 0,1,2,4, or a keep.json of select'
    )
    for command in (score, select):
        _add_sampling(command)
    _add_choice(select.add_argument)
    return parser.parse_args(argv)


def _add_choice(add: Callable[..., object]) -> None:
    """Add the options of `select`."""
    add('--remove', required=True, type=int, metavar='N', help='number of blocks to remove')
    add('--candidates', type=int, metavar='N', help='least important blocks to choose from (default: N + 4, or all)')
    add('--check-prompts', type=int, default=8, metavar='N',
        help='videos to compare in each trial, one per prompt (default: 8)')  # fmt: skip
    add('--decoder', action=PathOption, metavar='DIR',
        help='component folder of a video VAE, to compare frames instead of latents')  # fmt: skip


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options that `score` and `select` share."""
    add = parser.add_argument
    add(
        '--data', required=True, metavar='DIR', help='folder of train.latents or train.teacher_samples, for its prompts'
    )
    add('--prompts', type=int, default=100, metavar='N', help='number of different prompts (default: %(default)s)')
    add('--samples', type=int, default=5, metavar='N', help='videos of each prompt (default: %(default)s)')
    add('--steps', type=int, nargs=3, default=(10, 10, 10), metavar='N', help='steps per stage (default: 10 10 10)')
    add('--first-steps', type=int, nargs=3, default=(20, 20, 20), metavar='N',
        help='steps per stage of unit 0 (default: 20 20 20)')  # fmt: skip
    add('--guidance', type=float, default=5.0, metavar='G', help='guidance scale (default: %(default)s)')
    add(
        '--first-guidance', type=float, default=7.0, metavar='G', help='guidance scale of unit 0 (default: %(default)s)'
    )
    add('--seed', type=int, default=0, help='seed of the noise (default: %(default)s)')
    add('--batch', type=int, default=1, metavar='N', help='videos at a time on each device (default: %(default)s)')
    add('--dtype', choices=tuple(DTYPES), default='bfloat16', help='compute type (default: %(default)s)')


def apply(denoiser: pathlib.Path, keep_list: str, out: pathlib.Path) -> None:
    """Write a denoiser with only the kept blocks; `pruning.json` beside its weights lists them.

    Raises:
      InputError: the denoiser cannot be read, the keep list is invalid for it, or `out` is its own folder.
    """
    keep = read_keep(keep_list)
    if os.path.realpath(out) == os.path.realpath(denoiser):
        raise InputError(f'--out {out} is the folder of --denoiser, which would be overwritten; name another folder.')
    module, params = read_denoiser(denoiser)
    module, params = prune(module.clone(scan=True), params, keep)
    checkpoint.save(out, module, params)
    with atomic_file(out / 'pruning.json') as path:
        path.write_text(json.dumps({KEEP: list(keep), 'denoiser': fingerprint(denoiser)}, indent=2) + '\n')
    print(f'{out}: {len(keep)} blocks')


def run(args: argparse.Namespace) -> None:
    """Run one of the commands.

    Raises:
      InputError: an argument or a folder is not usable.
    """
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items()
    }
    with output_folder(args.out):
        _run(args.command, values)


def _run(command: str, values: dict[str, Any]) -> None:
    """Run one of the commands in its output folder."""
    if command == 'apply':
        apply(values['denoiser'], values['keep'], values['out'])
        return
    use_compile_cache()
    sampling = Sampling(**{field.name: values[field.name] for field in dataclasses.fields(Sampling)})
    chosen = {field.name: values[field.name] for field in dataclasses.fields(Selection) if field.name in values}
    measure(sampling, Selection(**chosen) if command == 'select' else None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_args(argv)))


if __name__ == '__main__':
    sys.exit(main())
