"""Print the parameters of every component of a released checkpoint: `python -m neodragon_jax.sizes [full|tiny]`.

Nothing is allocated. Pyramid-Flow's denoiser, video VAE and T5-XXL encoder, from which training starts, are not in the
release and not in the table; quicksrnet, for --upscale, is.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from typing import NamedTuple

from neodragon_jax.base.command_line import command_parser, exit_status
from neodragon_jax.checkpoint.abstract import tensor_shapes
from neodragon_jax.checkpoint.random_params import PRESETS, Part

# Stored with the weights, but fixed: not a parameter.
TABLE = 'pos_embed.pos_embed'


class Size(NamedTuple):
    """Size of one component."""

    folder: str
    tensors: int
    parameters: int


def component_sizes(parts: Mapping[str, Part]) -> list[Size]:
    """Return the size of every component of a checkpoint, from abstract shapes.

    Args:
      parts: folder -> component.
    """
    return [Size(folder, *_counts(part)) for folder, part in parts.items()]


@functools.cache
def _counts(part: Part) -> tuple[int, int]:
    """Return the numbers of tensors and of parameters of a component; a checkpoint has some components twice."""
    shapes = tensor_shapes(part.kind, part.config)
    return len(shapes), sum(math.prod(leaf.shape) for key, leaf in shapes.items() if key != TABLE)


def main() -> None:
    """Print the table of a preset."""
    parser = command_parser(
        'python -m neodragon_jax.sizes',
        'Print the number of parameters of every component of a released checkpoint, and of quicksrnet; nothing is '
        'allocated.',
        'example:\n  python -m neodragon_jax.sizes tiny',
    )
    parser.add_argument(
        'preset', nargs='?', choices=PRESETS, default='full', help='sizes of the components (default: %(default)s)'
    )
    sizes = component_sizes(PRESETS[parser.parse_args().preset])
    for size in [*sizes, Size('all', sum(s.tensors for s in sizes), sum(s.parameters for s in sizes))]:
        print(f'{size.folder:40} {size.tensors:5} tensors {size.parameters:14,} parameters')


if __name__ == '__main__':
    sys.exit(exit_status(main))
