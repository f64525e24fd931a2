"""Command-line options of a video and of its sampling."""

from __future__ import annotations

import argparse

from neodragon_jax.base.command_line import PathOption
from neodragon_jax.generation import defaults
from neodragon_jax.generation.defaults import RELEASED


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the first frame, the size and the texts."""
    add = parser.add_argument_group('video').add_argument
    add('--image', action=PathOption, bucket=True, metavar='FILE',
        help="picture of the first frame, cropped at the center to the video's shape; transparent areas become "
        'white')  # fmt: skip
    add('--first-frame', choices=defaults.FIRST_FRAMES,
        help='source of the first frame in hybrid mode without --image: the first-frame model of the checkpoint, or '
        f'the few-step denoiser ({released(RELEASED.hybrid.first_frame)})')  # fmt: skip
    add('--frames', type=int, metavar='N', help=f'video frames, 8 n + 1 ({released(RELEASED.frames)})')
    add('--height', type=int, metavar='PX', help=f'multiple of 64 ({released(RELEASED.height)})')
    add('--width', type=int, metavar='PX', help=f'multiple of 64 ({released(RELEASED.width)})')
    add('--prompt-modifier', metavar='TEXT',
        help=f'text appended to every prompt ({released("the released one")})')  # fmt: skip
    add('--negative-prompt', metavar='TEXT',
        help=f'text that guidance steers away from ({released(repr(RELEASED.negative_prompt))})')  # fmt: skip


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the sampler."""
    add = parser.add_argument_group('sampling').add_argument
    few, many = RELEASED.hybrid, RELEASED.monolithic
    steps, many_steps, first_steps = (' '.join(map(str, n)) for n in (few.steps, many.steps, many.first_steps))
    by_mode = lambda hybrid, monolithic: released(f'{hybrid}, or {monolithic} in monolithic mode')
    add('--steps', type=int, nargs=3, metavar='N',
        help=f'steps per stage, coarsest first ({by_mode(steps, many_steps)})')  # fmt: skip
    add('--first-steps', type=int, nargs=3, metavar='N',
        help=f'steps of unit 0 ({by_mode("--steps", first_steps)})')  # fmt: skip
    add('--guidance', type=float, metavar='G',
        help=f'classifier-free guidance ({by_mode("none", f"{many.guidance:g}")})')  # fmt: skip
    add('--first-guidance', type=float, metavar='G',
        help=f'guidance of unit 0 ({by_mode("--guidance", f"{many.first_guidance:g}")})')  # fmt: skip


def released(value: object) -> str:
    """Return the note on a default that generation.json may change."""
    return f'default, without generation.json: {value}'
