"""Write a checkpoint of random weights in the released layout: the whole system at its true size, without a download.

    python -m neodragon_jax.random_checkpoint --tokenizers tests/goldens/tiny_checkpoint --out out/random

Time, memory and sizes of exported graphs are those of the released weights; the videos are noise. With --like-trained
the weights are about as hard to quantize as trained ones, see `checkpoint.random_params.like_trained`. One component at
a time is in memory, and complete ones are not made again.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from neodragon_jax.base.atomic import atomic_folder
from neodragon_jax.base.command_line import PathOption, command_parser, exit_status
from neodragon_jax.base.errors import InputError, did_you_mean
from neodragon_jax.base.output import output_folder
from neodragon_jax.base.progress import ProgressBar
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.checkpoint.classes import COMPONENTS
from neodragon_jax.checkpoint.params import cast
from neodragon_jax.checkpoint.random_params import MULTISTEP, PRESETS, Part, like_trained, random_params
from neodragon_jax.generation.options import check_seed

TOKENIZERS = (*folders.TOKENIZERS, *folders.FIRST_FRAME_TOKENIZERS)


@dataclasses.dataclass(frozen=True)
class RandomCheckpointOptions:
    """Options of this command; `components` None makes those of the hybrid system."""

    out: pathlib.Path
    size: str
    tokenizers: pathlib.Path
    components: Sequence[str] | None
    dtype: str
    seed: int
    like_trained: bool

    def __post_init__(self) -> None:
        check_seed(self.seed)


def write(
    out: pathlib.Path,
    parts: dict[str, Part],
    tokenizers: pathlib.Path,
    dtype: Any = None,
    seed: int = 0,
    trained: bool = False,
) -> list[str]:
    """Write the missing component folders and copy the tokenizers; return the names of the new components.

    Args:
      trained: whether parameters are changed by `like_trained`.
    Raises:
      InputError: a tokenizer folder is missing.
    """
    for name in TOKENIZERS:
        if not (tokenizers / name).is_dir():
            raise InputError(f'{tokenizers}: no {name} in it. Pass a checkpoint that has tokenizers with --tokenizers.')
    for name in TOKENIZERS:
        if not (out / name).is_dir():
            with atomic_folder(out / name) as partial:
                shutil.copytree(tokenizers / name, partial, dirs_exist_ok=True)
    made = []
    with ProgressBar(parts.items(), unit='component') as bar:
        for name, part in bar:
            bar.set_description(name)
            # A component's config is written last.
            if (out / name / 'config.json').is_file():
                continue
            own_seed = zlib.crc32(name.encode()) + seed
            params = random_params(part.kind, part.config, own_seed)
            params = cast(like_trained(params, own_seed) if trained else params, dtype)
            checkpoint.save(out / name, COMPONENTS[part.kind].build(part.config), params)
            made.append(name)
    return made


def parse_options(argv: Sequence[str] | None = None) -> RandomCheckpointOptions:
    """Return the options of a command line."""
    parser = command_parser(
        'python -m neodragon_jax.random_checkpoint',
        'Write a checkpoint of random weights in the released layout, to measure the system without the released\n'
        'weights. Complete components are kept, so an interrupted run continues.',
        'example:\n  python -m neodragon_jax.random_checkpoint --tokenizers CKPT --out out/random',
    )
    _add_arguments(parser.add_argument)
    return RandomCheckpointOptions(**vars(parser.parse_args(argv)))


def _add_arguments(add: Callable[..., object]) -> None:
    """Add the options of this command."""
    add('--out', action=PathOption, required=True, metavar='DIR', help='root of the new checkpoint')
    add('--size', choices=PRESETS, default='full',
        help='full: the released sizes, 10 GB in bfloat16 (default: %(default)s)')  # fmt: skip
    add('--tokenizers', action=PathOption, required=True, metavar='DIR',
        help='checkpoint to copy the tokenizers from; its vocabulary may be smaller than that of the text '
        'encoders')  # fmt: skip
    add('--components', nargs='+', metavar='NAME', help='components to make (default: those of --mode hybrid)')
    add('--dtype', choices=('float32', 'bfloat16'), default='bfloat16', help='stored type (default: %(default)s)')
    add('--seed', type=int, default=0, help='seed of the weights, 0 to 4294967295 (default: %(default)s)')
    add('--like-trained', action='store_true',
        help='add heavy tails, a few large channels and small residual branches, to try quantization on')  # fmt: skip


def run(options: RandomCheckpointOptions) -> None:
    """Write the components that are missing."""
    parts = PRESETS[options.size]
    names = options.components or [name for name in parts if name not in MULTISTEP]
    for name in names:
        if name not in parts:
            raise InputError(
                f'--components {name}: no such component.{did_you_mean(name, parts)} Known: {", ".join(parts)}.'
            )
    chosen = {name: parts[name] for name in names}
    with output_folder(options.out):
        dtype = jnp.dtype(options.dtype)
        made = write(options.out, chosen, options.tokenizers, dtype, options.seed, options.like_trained)
    size = sum(path.stat().st_size for path in options.out.rglob('*') if path.is_file())
    print(f'{options.out}: {len(made)} components made, {len(chosen) - len(made)} kept; {size / 1e9:.2f} GB')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: run(parse_options(argv)))


if __name__ == '__main__':
    sys.exit(main())
