"""Print the XLA flags for training on TPUs, for a launch script:

export LIBTPU_INIT_ARGS="$(python -m train.tpu_flags)"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from neodragon_jax.base.command_line import exit_status
from train.aot.xla_flags import FLAGS


def main(argv: Sequence[str] | None = None) -> None:
    """Print the flags for LIBTPU_INIT_ARGS."""
    argparse.ArgumentParser(
        'python -m train.tpu_flags', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    print(' '.join(f'--{name}={value}' for name, value in FLAGS.items()))


if __name__ == '__main__':
    sys.exit(exit_status(main))
