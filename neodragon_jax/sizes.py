"""Print the parameters of every component: `python -m neodragon_jax.sizes [full|tiny]`. Nothing is allocated."""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

from neodragon_jax.base.command_line import command_parser, exit_status
from neodragon_jax.checkpoint.abstract import tensor_shapes
from neodragon_jax.config.neodragon import FULL, TINY, ComponentConfig, SystemConfig

PRESETS = {'full': FULL, 'tiny': TINY}
# Stored with the weights, but fixed: not a parameter.
TABLE = 'pos_embed.pos_embed'


class Size(NamedTuple):
    """Size of one component."""

    name: str
    tensors: int
    parameters: int


def component_sizes(system: SystemConfig) -> list[Size]:
    """Return the size of every component of a preset, from abstract shapes."""
    components: list[tuple[str, str, ComponentConfig]] = [
        ('PyramidMMDiT', 'PyramidMMDiT', system.denoiser),
        ('context adapter', 'ContextAdapter', system.context_adapter),
        ('DT5', 'T5EncoderWithProjection', system.t5),
        ('CLIP-L', 'CLIPTextModelWithProjection', system.clip_l),
        ('CLIP-G', 'CLIPTextModelWithProjection', system.clip_g),
        ('video VAE', 'AsymmetricCausalVideoVAE', system.video_vae),
    ]
    sizes = []
    for name, kind, config in components:
        shapes = tensor_shapes(kind, config)
        count = sum(math.prod(leaf.shape) for key, leaf in shapes.items() if key != TABLE)
        sizes.append(Size(name, len(shapes), count))
    return sizes


def main() -> None:
    """Print the table of a preset."""
    parser = command_parser(
        'python -m neodragon_jax.sizes',
        'Print the number of parameters of every component; nothing is allocated.',
        'example:\n  python -m neodragon_jax.sizes tiny',
    )
    parser.add_argument(
        'preset', nargs='?', choices=PRESETS, default='full', help='sizes of the components (default: %(default)s)'
    )
    sizes = component_sizes(PRESETS[parser.parse_args().preset])
    for size in [*sizes, Size('all', sum(s.tensors for s in sizes), sum(s.parameters for s in sizes))]:
        print(f'{size.name:16} {size.tensors:5} tensors {size.parameters:14,} parameters')


if __name__ == '__main__':
    sys.exit(exit_status(main))
