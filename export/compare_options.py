"""Comparison of the compiler's options on exported graphs: size, time and counts of each binary. See `--help`."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from neodragon_jax.base.atomic import check_writable
from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.lists import known_entries

if TYPE_CHECKING:
    from export.qnn.chipsets import Target

EXAMPLES = """
examples:
  all options on two graphs of an export:
    python -m export.compare_options phone/denoiser_stage2-onnx-w8a16/denoiser_stage2.onnx \\
        phone/clip_g-onnx-fp16/clip_g.onnx --out out/options

  two blocks of the last denoiser stage at its released size, with random weights:
    python -m export.compare_options --full-size-stage 2 --out out/options

Nothing runs here but the compiler: the latencies are estimates from counts, which most options do not change.
"""


@dataclasses.dataclass(frozen=True)
class OptionsToCompare:
    """Options of this command.

    Attributes:
      graphs: ONNX files in the layout of an export, {graph}-onnx-{precision}/{graph}.onnx.
      target: chipset.
      variants: names of sets of options, from `option_table.VARIANTS`.
      full_size_stage: stage of the denoiser to build at its released size, with two blocks; None builds none.
      heads: its attention heads of 64 dimensions.
      out: folder for options.md and options.json.
    """

    graphs: Sequence[pathlib.Path]
    target: Target
    variants: Sequence[str]
    full_size_stage: int | None
    heads: int
    out: pathlib.Path


def parse_options(argv: Sequence[str] | None = None) -> OptionsToCompare:
    """Return the options of a command line.

    Raises:
      InputError: an option is wrong.
    """
    description = "Compile exported graphs with several sets of the compiler's options and compare the binaries."
    parser = command_parser('python -m export.compare_options', description, EXAMPLES)
    _add_arguments(parser.add_argument)
    return _checked(parser.parse_args(argv))


def _checked(args: argparse.Namespace) -> OptionsToCompare:
    """Return the options of parsed arguments; raise InputError if one is wrong."""
    if not args.graphs and args.full_size_stage is None:
        raise InputError('nothing to compile: give graphs of an export, or --full-size-stage.')
    if args.heads < 1:
        raise InputError(f'--heads is {args.heads}; give at least 1.')
    from export.qnn.chipsets import find_target
    from export.steps.option_table import VARIANTS, precision_of

    for path in args.graphs:
        precision_of(path)
    names = list(VARIANTS) if args.options is None else known_entries('--options', args.options.lower(), VARIANTS)
    return OptionsToCompare(args.graphs, find_target(args.soc), names, args.full_size_stage, args.heads, args.out)


def _add_arguments(add: Callable[..., object]) -> None:
    add('graphs', nargs='*', action=PathOption, metavar='ONNX',
        help='graphs of an export: OUT/{graph}-onnx-{precision}/{graph}.onnx')  # fmt: skip
    add('--full-size-stage', type=int, choices=range(3), metavar='N',
        help='build two blocks of this denoiser stage at its released size with random weights, too; takes '
        'minutes')  # fmt: skip
    add('--heads', type=int, default=24, metavar='N',
        help='attention heads of 64 dimensions of that stage; fewer for a trial (default: %(default)s)')  # fmt: skip
    add('--out', action=PathOption, required=True, metavar='DIR', help='folder of options.md and options.json')
    add('--soc', default='sm8750', metavar='NAME', help='chipset (default: %(default)s)')
    add('--options', metavar='LIST', help='comma-separated sets of options (default: all)')


def run(options: OptionsToCompare) -> None:
    """Compile every graph with every set of options; print a line for each and write the table."""
    from export.steps.option_table import compile_variants, table_line, write_full_size_stage, write_table

    check_writable(options.out)
    rows, graphs = [], list(options.graphs)
    if options.full_size_stage is not None:
        graphs.append(write_full_size_stage(options.full_size_stage, options.heads, options.out))
    for row in compile_variants(graphs, options.target, options.variants):
        rows.append(row)
        print(table_line(row), flush=True)
    write_table(options.out, rows, options.target)
    print(options.out / 'options.md')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_options(argv)))


if __name__ == '__main__':
    sys.exit(main())
