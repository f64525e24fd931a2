"""Train the whole system from random weights on moving shapes, and measure the attributes that its videos show.

    python -m train.benchmark --out out/benchmark                   (or: make benchmark)
    python -m train.benchmark --out out/benchmark --seeds 0,1,2 --jobs 2
    python -m train.benchmark --out out/fast --fast                 every command once, in minutes
    python -m train.benchmark --out out/sharp --start CKPT          continue from a checkpoint of an earlier run

Autoencoder, small decoder, teacher, text encoder, pruning and step distillation run one after the other, each by its
own program. Then videos of held-out captions are generated; colors, shapes, directions and speeds are read from their
pixels.
OUT/report.md and OUT/report.html compare them with the targets; OUT/seed-0/moving_shapes is a checkpoint for
`python -m neodragon_jax`. Ctrl-C or SIGTERM stops the running programs, and trainings save first; the same command
continues.

A missed target is reported and does not stop the run; with --gate it sets the exit status.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.lists import comma_list
from neodragon_jax.checkpoint import shipped
from neodragon_jax.checkpoint.components import component_folder
from neodragon_jax.checkpoint.folders import TEACHER
from train.benchmark.record import read_changes
from train.benchmark.run import Options, run
from train.benchmark.tiers import TIERS

EXAMPLES = """
tiers:
  cpu       two hours of one core for the first seed, one and a half for others
  gpu       longer clips of a richer world, for an accelerator
  vivid     33 frames of 128x128 with light and texture
  one_step  recipes of one-step students, on the teacher of tier cpu
  collapse  motion with the student's own frames as history: long clips whose captions omit it
  recovery  a pruned denoiser after 50 to 400 steps, with stage 1 and without it; needs --start
  cosine    text encoders alone: the cosine term, for a teacher with outlier channels

  With --start, tier cpu trains the teacher further for sharper first frames, collapse trains it further on long
  clips, and one_step keeps it.

examples:
  one seed, two programs at a time (73 minutes of two cores):
    python -m train.benchmark --out out/benchmark --jobs 2

  three seeds, two programs at a time:
    python -m train.benchmark --out out/benchmark --seeds 0,1,2 --jobs 2

  sharper first frames for a checkpoint that an earlier run made:
    python -m train.benchmark --start out/benchmark/seed-0/moving_shapes --out out/sharp

  recipes of one-step students, on the teacher of the shipped checkpoint:
    python -m train.benchmark --tier one_step --start moving_shapes --out out/one_step

  another setting of one step; OUT is a copy without the folders of that step and of those made from it:
    python -m train.benchmark --out out/weights --set stage2:--config.pruning.image_weight=0.1

The same command continues a stopped run.
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    description = 'Train the whole system on moving shapes, and measure its videos from their pixels.'
    missed = '1    a target is missed, with --gate'
    parser = command_parser('python -m train.benchmark', description, EXAMPLES, status=missed)
    add = parser.add_argument
    add(
        '--out',
        action=PathOption,
        default='out/benchmark',
        metavar='DIR',
        help='folder of all results (default: %(default)s)',
    )
    add('--tier', choices=tuple(name for name in TIERS if name != 'fast'), default='cpu',
        help='size of the benchmark, see below (default: %(default)s)')  # fmt: skip
    add('--fast', action='store_true', help='run every command once with almost no training, as a test')
    add('--start', action=PathOption, names=('hf',), metavar='CKPT',
        help='use the VAE, the text encoders and the teacher of this checkpoint, see below')  # fmt: skip
    add('--seeds', default='0', metavar='N,N', help='seeds of the teacher and all later steps (default: %(default)s)')
    add('--only', choices=('train', 'evaluate', 'report'), help='run only this part')
    add('--until', metavar='STEP', help='stop after this step of the chain')
    add('--set', action='append', default=[], metavar='STEP:--config.NAME=VALUE',
        help='change a setting of one training; may be repeated')  # fmt: skip
    add('--jobs', type=int, default=1, metavar='N',
        help='programs that run side by side, each on its share of the cores (default: %(default)s)')  # fmt: skip
    add('--devices', type=int, default=os.cpu_count(), metavar='N',
        help='virtual devices of all jobs together, where there is no accelerator (default: %(default)s)')  # fmt: skip
    add('--gate', action='store_true', help='exit with status 1 if a target is missed')
    return parser.parse_args(argv)


def read_options(args: argparse.Namespace) -> Options:
    """Return the checked options of a command line.

    Raises:
      InputError: an option is wrong.
    """
    try:
        seeds = tuple(map(int, comma_list(args.seeds)))
    except ValueError:
        raise InputError(f'--seeds {args.seeds}: give numbers, such as 0,1,2.') from None
    if not seeds or not all(0 <= seed < 2**32 for seed in seeds):
        raise InputError(f'--seeds {args.seeds}: give numbers from 0 to 4294967295.')
    if len(set(seeds)) < len(seeds):
        raise InputError(f'--seeds {args.seeds}: names a seed twice; name each once.')
    if args.until and args.only in ('evaluate', 'report'):
        raise InputError(f'--until {args.until}: is for trainings; leave it out with --only {args.only}.')
    if args.set and args.only in ('evaluate', 'report'):
        raise InputError(f'--set {args.set[0]}: is for trainings; leave it out with --only {args.only}.')
    if args.jobs < 1 or args.devices < args.jobs:
        raise InputError(f'--jobs {args.jobs}, --devices {args.devices}: give at least 1, and a device for each job.')
    tier = 'fast' if args.fast else args.tier
    start = (
        None
        if args.start is None
        else component_folder(shipped.find(args.start, option='--start'), TEACHER).parent.resolve()
    )
    changes = read_changes(args.set)
    return Options(args.out, tier, start, seeds, args.only, args.until, args.jobs, args.devices, changes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""

    def status() -> int:
        args = parse_args(argv)
        missed = run(read_options(args))
        return int(args.gate and missed > 0)

    return exit_status(status)


if __name__ == '__main__':
    sys.exit(main())
