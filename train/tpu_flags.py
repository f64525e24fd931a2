"""Print the XLA flags for training on TPUs, for a launch script:

export LIBTPU_INIT_ARGS="$(python -m train.tpu_flags)"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from neodragon_jax.base.command_line import command_parser, exit_status
from train.aot.xla_flags import FLAGS


def main(argv: Sequence[str] | None = None) -> None:
    """Print the flags for LIBTPU_INIT_ARGS."""
    command_parser('python -m train.tpu_flags', str(__doc__)).parse_args(argv)
    print(' '.join(f'--{name}={value}' for name, value in FLAGS.items()))


if __name__ == '__main__':
    sys.exit(exit_status(main))
