"""The history of a unit: its frames and their stages, and the envelope, one static shape for all units of a stage.

A unit sees the units before it: the previous one at its own stage, each older one a stage coarser. The envelope of a
stage is the layout of the last unit; shorter histories are padded at the front, and the padding is masked.
`pyramid.layout` has the order of the tokens, their positions and the attention mask.

Legend: B batch, T latent frames, H W latent grid, C channels, F frames in the envelope.
Source: Pyramid-Flow, arXiv 2410.05954, section 3.3 (temporal pyramid).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neodragon_jax.base.errors import InputError
from neodragon_jax.pyramid.layout import Layout
from neodragon_jax.pyramid.stages import levels

Latents = Float[Array, 'B T H W C']


def history_stage(stage: int, distance: int) -> int:
    """Return the stage of the history unit `distance` units before a unit at `stage`: one coarser per unit."""
    return max(stage - (distance - 1), 0)


def history(latents: Latents, stage: int, stages: int, frames_per_unit: int = 1) -> list[Float[Array, 'B _ _ _ C']]:
    """Return the history clips for the unit that follows `latents`, oldest first.

    Args:
      latents: all clean latents so far, at full size; T is a multiple of frames_per_unit and may be 0.
      stage: stage of the unit to be denoised.
      stages: number of stages.
    """
    units = latents.shape[1] // frames_per_unit
    pyramid = levels(latents, stages)
    clips: list[Array] = []
    end = latents.shape[1]
    for distance in range(1, units + 1):
        level = history_stage(stage, distance)
        # Once the coarsest stage is reached, all older units are one clip.
        start = 0 if level == 0 and distance > 1 else end - frames_per_unit
        clips.append(pyramid[level][:, start:end])
        end = start
        if end == 0:
            break
    return clips[::-1]


def envelope(stage: int, units: int, stages: int, grid: tuple[int, int], text_tokens: int) -> Layout:
    """Return the layout that holds any unit 0..units at a stage: the layout of unit `units`.

    Args:
      grid: patches (rows, columns) of a full-size latent frame.
    Raises:
      InputError: the grid cannot be halved down to the coarsest stage.
    """
    factor = 2 ** (stages - 1)
    if grid[0] % factor or grid[1] % factor:
        raise InputError(
            f'a grid of {grid[0]}x{grid[1]} patches has no {stages} stages; make both divisible by {factor}.'
        )

    def at(level: int) -> tuple[int, int]:
        return grid[0] >> (stages - 1 - level), grid[1] >> (stages - 1 - level)

    past = [at(history_stage(stage, distance)) for distance in range(units, 0, -1)]
    return Layout(text_tokens, (*past, at(stage)))


def envelope_history(
    pyramid: Sequence[Float[Array, 'B T _ _ C']], unit: Int[Array, ' B'], stage: int, units: int
) -> list[Float[Array, 'B 1 _ _ C']]:
    """Return `units` history frames, oldest first, front-padded with zeros; the unit may differ per example.

    The frames have the shapes of `envelope`; where unit < units the first units - unit of them are padding.

    Args:
      pyramid: the clean latents at every stage (`levels`), T frames each; only frames before `unit` are read.
      unit: index of the unit to be denoised, per example.
    """
    batch = jnp.arange(unit.shape[0])
    frames = []
    for distance in range(units, 0, -1):
        source = pyramid[history_stage(stage, distance)]
        index = unit - distance
        frame = source[batch, jnp.clip(index, 0, source.shape[1] - 1)]
        frames.append(jnp.where((index >= 0)[:, None, None, None], frame, 0)[:, None])
    return frames


def envelope_frame_ids(unit: Int[Array, ' B'], units: int) -> Int[Array, 'B F']:
    """Return the video frame index of every frame in the envelope, [B, units + 1]; negative means padding."""
    return unit[:, None] + jnp.arange(-units, 1)[None, :]
