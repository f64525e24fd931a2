"""Write tokenizers and small random text encoders for the captions of moving shapes.

    python -m train.shapes.language --out out/language

See `train.shapes.text_encoders` for the files and sizes.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from neodragon_jax.base.command_line import command_parser, exit_status
from train.shapes.text_encoders import write


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_parser(
        'python -m train.shapes.language',
        'Write tokenizers and random text encoders for captions of moving shapes.',
        'example:\n  python -m train.shapes.language --out out/language',
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='root of the checkpoint')
    parser.add_argument('--seed', type=int, default=0, help='seed of the weights (default: %(default)s)')
    args = parser.parse_args(argv)
    return exit_status(lambda: write(pathlib.Path(args.out), args.seed))


if __name__ == '__main__':
    sys.exit(main())
