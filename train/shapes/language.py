"""Write tokenizers and small random text encoders for the captions of moving shapes.

    python -m train.shapes.language --out out/language

See `train.shapes.text_encoders` for the files and sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.output import output_folder
from neodragon_jax.generation.options import check_seed
from train.shapes.text_encoders import write


def run(argv: Sequence[str] | None = None) -> None:
    """Write the encoders of a command line."""
    parser = command_parser(
        'python -m train.shapes.language',
        'Write tokenizers and random text encoders for captions of moving shapes.',
        'example:\n  python -m train.shapes.language --out out/language',
    )
    parser.add_argument('--out', action=PathOption, required=True, metavar='DIR', help='root of the checkpoint')
    parser.add_argument('--seed', type=int, default=0, help='seed of the weights (default: %(default)s)')
    args = parser.parse_args(argv)
    with output_folder(args.out):
        write(args.out, check_seed(args.seed))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(argv))


if __name__ == '__main__':
    sys.exit(main())
