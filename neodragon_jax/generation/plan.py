"""From the options of a video to the sampler's plan: latent sizes, steps and guidance per stage."""

from __future__ import annotations

from collections.abc import Sequence

from neodragon_jax.generation.defaults import RELEASED, SPATIAL_FACTOR, TEMPORAL_FACTOR, ModeDefaults, check_size
from neodragon_jax.pyramid.sampler import Plan


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
      defaults: what holds for arguments that are None; default: the released ones of the mode. Hybrid: 1-1-1 without
        guidance; monolithic: 20-20-20 at guidance 7 for unit 0, 10-10-10 at 5 for others.
    Raises:
      InputError: the size does not fit the latent pyramid.
    """
    check_size(frames, height, width)
    given = {
        'steps': tuple(steps) if steps else None,
        'first_steps': tuple(first_steps) if first_steps else None,
        'guidance': guidance,
        'first_guidance': first_guidance,
    }
    chosen = (defaults or RELEASED.of(mode)).but({key: value for key, value in given.items() if value is not None})
    return Plan(
        frames=1 + (frames - 1) // TEMPORAL_FACTOR,
        height=height // SPATIAL_FACTOR,
        width=width // SPATIAL_FACTOR,
        steps=chosen.steps,
        first_steps=chosen.first_steps,
        guidance=chosen.guidance,
        first_guidance=chosen.first_guidance,
    )
