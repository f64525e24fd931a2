"""Comparison of the forms of a denoiser stage by their cost on the chip, without a phone. See `--help`."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from neodragon_jax.base.atomic import check_writable
from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.lists import known_entries

if TYPE_CHECKING:
    from export.graphs.denoiser import Form
    from export.qnn.chipsets import Target
    from export.steps.forms import FormRow

STAGES = 3

EXAMPLES = """
examples:
  stage 2 of the full-size denoiser in all forms, for Snapdragon 8 Elite:
    python -m export.compare_stage --out out/stage2

  two forms for 8 Gen 3:
    python -m export.compare_stage --forms masked,prefix_folded_matrices --soc sm8650 --out out/stage2
"""


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Options of a comparison.

    Attributes:
      out: folder for compare.md and compare.json.
      stage: pyramid stage, 0 to 2.
      target: chipset.
      forms: forms by name.
      blocks: number of blocks of the whole model, at least 2.
      heads: attention heads of 64 dimensions.
    """

    out: pathlib.Path
    stage: int
    target: Target
    forms: dict[str, Form]
    blocks: int
    heads: int

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        forms = {name: dataclasses.asdict(form) for name, form in self.forms.items()}
        return {
            'stage': self.stage,
            'soc': self.target.chipset,
            'forms': forms,
            'blocks': self.blocks,
            'heads': self.heads,
        }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = command_parser(
        'python -m export.compare_stage',
        'Build a stage of the denoiser in several forms and count operations, bytes and weights.',
        EXAMPLES,
        status='1    the shipped form saves less than required',
    )
    add = parser.add_argument
    add('--out', action=PathOption, required=True, metavar='DIR', help='folder for compare.md and compare.json')
    add('--stage', type=int, default=2, choices=range(STAGES), help='pyramid stage (default: %(default)s)')
    add('--soc', default='sm8750', metavar='NAME', help='chipset (default: %(default)s)')
    add('--forms', metavar='LIST', help='comma-separated forms (default: all)')
    add('--blocks', type=int, default=18, metavar='N', help='blocks of the whole model (default: %(default)s)')
    add('--heads', type=int, default=24, metavar='N',
        help='attention heads of 64 dimensions; fewer for a quick trial (default: %(default)s)')  # fmt: skip
    add('--first-frame-given', action='store_true',
        help='graphs that never generate frame 0: text then does not attend to current keys')  # fmt: skip
    return parser.parse_args(argv)


def make_options(args: argparse.Namespace) -> CompareOptions:
    """Return the options of a command line.

    Raises:
      InputError: an option is wrong.
    """
    from export.graphs.denoiser import FORMS
    from export.qnn.chipsets import find_target

    if args.blocks < 2 or args.heads < 1:
        raise InputError(f'--blocks {args.blocks} --heads {args.heads}: give at least two blocks and one head.')
    draws = not args.first_frame_given
    forms = {name: dataclasses.replace(FORMS[name], supports_frame_zero=draws) for name in read_forms(args.forms)}
    return CompareOptions(args.out, args.stage, find_target(args.soc), forms, args.blocks, args.heads)


def read_forms(text: str | None) -> list[str]:
    """Return the forms of a comma-separated list, or all.

    Raises:
      InputError: a form is unknown, or the list is empty.
    """
    from export.graphs.denoiser import FORMS

    return list(FORMS) if text is None else known_entries('--forms', text, FORMS)


def run(options: CompareOptions) -> list[FormRow]:
    """Build all forms and count their operations and bytes; write compare.md and compare.json; return the rows."""
    import tqdm

    from export.steps.form_table import table_line, write_forms
    from export.steps.forms import RELEASED, compare_forms, released_config

    config = released_config(options.heads)
    bar = tqdm.tqdm(total=2 * len(options.forms), unit='graph', disable=not sys.stderr.isatty())

    def on_graph(text: str) -> None:
        bar.set_description(text)
        bar.update()

    rows = []
    check_writable(options.out)
    about = (config, options.forms, options.stage, options.target, options.blocks, RELEASED)
    for row in compare_forms(*about, on_graph):
        rows.append(row)
        if bar.disable:
            print(table_line(row), flush=True)
    bar.close()
    write_forms(options.out, rows, options.to_json())
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: _status(make_options(parse_args(argv))))


def _status(options: CompareOptions) -> int:
    """Compare the forms and print the verdict; return 1 if a form misses its target, else 0."""
    rows = run(options)
    from export.steps.form_table import verdict

    print(options.out / 'compare.md')
    lines = verdict(rows, options.stage)
    print('\n'.join(lines))
    return int(any('MISSED' in line for line in lines))


if __name__ == '__main__':
    sys.exit(main())
