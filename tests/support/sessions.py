"""Sessions on the miniature checkpoint, and the clips they make."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from neodragon_jax import __main__ as cli
from neodragon_jax.base.video import write_contact_sheet
from neodragon_jax.generation.record import write_sheet
from neodragon_jax.generation.result import Video
from neodragon_jax.generation.session import Clip, Session
from support.goldens import TINY_CHECKPOINT

SIZE = ('--height', '64', '--width', '128', '--frames', '9')


def command(out: pathlib.Path, *more: str, root: pathlib.Path = TINY_CHECKPOINT) -> list[str]:
    """Return a command line for small videos of a miniature."""
    return ['--checkpoint', str(root), '--out', str(out), *SIZE, *more]


def make(out: pathlib.Path, *more: str, root: pathlib.Path = TINY_CHECKPOINT) -> int:
    """Run the command line on a miniature."""
    return cli.main(command(out, *more, root=root))


def open_command(argv: list[str], videos: int = 1) -> Session:
    """Return the session that a command line opens."""
    options = cli.parse_options(argv)
    return cli.load_system(options, videos).session(options.video, options.seed)


def open_session(*more: str, root: pathlib.Path = TINY_CHECKPOINT, videos: int = 1) -> Session:
    """Return the session of a command line on a miniature."""
    return open_command(command(pathlib.Path('-'), *more, root=root), videos)


def clips(session: Session, prompts: list[str]) -> list[Clip]:
    """Return the first sample of each prompt."""
    return list(session.make(prompts, [0] * len(prompts)))


def write_video(path: pathlib.Path, record: Mapping[str, Any] | None = None) -> None:
    """Write a video and its contact sheet as the command does; without a record, as before there was one."""
    clip = Video(np.zeros((9, 64, 128, 3), np.uint8), path.stem, 0)
    if record is None:
        write_contact_sheet(path.with_suffix('.png'), clip.frames)
    else:
        write_sheet(path.with_suffix('.png'), clip, record)
    clip.save(path)


@functools.cache
def plain_session() -> Session:
    """A session in float32 with all modules in memory."""
    return open_session()


@functools.cache
def plain_clip() -> np.ndarray:
    """A video of `plain_session`."""
    return clips(plain_session(), ['a cat'])[0].frames
