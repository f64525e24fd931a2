"""Settings of a video from its options: the sampler's plan, the texts and the source of the first frame."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from neodragon_jax.base import video
from neodragon_jax.base.paths import input_path
from neodragon_jax.generation.defaults import (
    RELEASED,
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    GenerationDefaults,
    ModeDefaults,
    check_size,
    choose_first_frame,
)
from neodragon_jax.generation.options import VideoOptions
from neodragon_jax.pyramid.sampler import Plan
from neodragon_jax.pyramid.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class VideoSettings:
    """Settings of a video, with all options resolved.

    Attributes:
      plan: latent sizes, steps and guidance.
      picture: the given first frame in [-1, 1]; None generates it.
      first_frame: source of the first frame if there is no picture, one of `defaults.FIRST_FRAMES`.
      modifier: text appended to every prompt.
      negative: text that guidance steers away from.
      noise: one of `options.NOISES`.
    """

    plan: Plan
    picture: Float[np.ndarray, 'H W 3'] | None
    first_frame: str
    modifier: str
    negative: str
    noise: str

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels, before any upscaling."""
        plan, side = self.plan, SPATIAL_FACTOR
        return 1 + TEMPORAL_FACTOR * (plan.frames - 1), side * plan.height, side * plan.width


def video_settings(options: VideoOptions, mode: str, defaults: GenerationDefaults) -> VideoSettings:
    """Return the settings of a video: options override generation.json, which overrides the released defaults.

    Raises:
      InputError: an option is out of range, or the picture cannot be read.
    """
    chosen = {
        name: getattr(defaults if getattr(options, name) is None else options, name)
        for name in ('frames', 'height', 'width', 'prompt_modifier', 'negative_prompt')
    }
    size = (chosen['frames'], chosen['height'], chosen['width'])
    steps, guidance = (options.steps, options.first_steps), (options.guidance, options.first_guidance)
    first_frame = choose_first_frame(options.first_frame, mode, defaults, picture=options.image is not None)
    plan = make_plan(mode, *size, *steps, *guidance, defaults.of(mode))
    image = options.image
    if isinstance(image, str | os.PathLike):
        image = video.read_image(input_path(image, '--image'))
    return VideoSettings(
        plan=plan,
        picture=None if image is None else video.picture_to_frame(image, *size[1:]),
        first_frame=first_frame,
        modifier=chosen['prompt_modifier'],
        negative=chosen['negative_prompt'],
        noise=options.noise,
    )


def make_plan(
    mode: str,
    frames: int,
    height: int,
    width: int,
    steps: Sequence[int] | None = None,
    first_steps: Sequence[int] | None = None,
    guidance: float | None = None,
    first_guidance: float | None = None,
    defaults: ModeDefaults | None = None,
) -> Plan:
    """Return the plan of a mode for a video of `frames` frames of `height` x `width` pixels.

    `steps` alone sets all units, and so does `guidance`.

    Args:
      defaults: values of the arguments that are None; None takes the released ones of the mode. Hybrid: 1-1-1 without
        guidance; monolithic: 20-20-20 at guidance 7 for unit 0, 10-10-10 at 5 for others.
    Raises:
      InputError: the size does not fit the latent pyramid.
    """
    check_size(frames, height, width)
    given = {
        'steps': None if steps is None else tuple(steps),
        'first_steps': None if first_steps is None else tuple(first_steps),
        'guidance': guidance,
        'first_guidance': first_guidance,
    }
    chosen = (defaults or RELEASED.of(mode)).with_values(
        {key: value for key, value in given.items() if value is not None}
    )
    return Plan(
        frames=1 + (frames - 1) // TEMPORAL_FACTOR,
        height=height // SPATIAL_FACTOR,
        width=width // SPATIAL_FACTOR,
        steps=chosen.steps,
        first_steps=chosen.first_steps,
        guidance=chosen.guidance,
        first_guidance=chosen.first_guidance,
        schedule=Schedule(spacing=chosen.spacing),
    )
