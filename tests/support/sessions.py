"""Sessions on the miniature checkpoint, and the clips they make."""

from __future__ import annotations

import functools
import pathlib

import numpy as np

from neodragon_jax import __main__ as cli
from neodragon_jax.generation import session as studio
from support.goldens import TINY_CHECKPOINT

SIZE = ('--height', '64', '--width', '128', '--frames', '9')


def make(out: pathlib.Path, *more: str, root: pathlib.Path = TINY_CHECKPOINT) -> int:
    """Run the command line on a miniature."""
    return cli.main(['--checkpoint', str(root), '--out', str(out), *SIZE, *more])


def open_studio(*more: str, root: pathlib.Path = TINY_CHECKPOINT, videos: int = 1) -> studio.Studio:
    return studio.Studio.open(cli.parse_args(['--checkpoint', str(root), '--out', '-', *SIZE, *more]), videos)


def clips(worker: studio.Studio, prompts: list[str]) -> list[studio.Clip]:
    return list(worker.make(prompts, [0] * len(prompts)))


@functools.cache
def plain_studio() -> studio.Studio:
    return open_studio()


@functools.cache
def plain_clip() -> np.ndarray:
    """A video of the miniature in float32, all modules in memory."""
    return clips(plain_studio(), ['a cat'])[0].frames
