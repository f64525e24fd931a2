"""First frames of teacher samples: pictures, or drawings of the checkpoint's first-frame model as in generation.

Legend: B batch, H W pixels.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.video import picture_to_frame, read_image
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.generation.consistency_sampler import DrawnPictureNoise
from neodragon_jax.generation.first_frame import FirstFrameModel, to_frames
from train.runtime.sharding import batch_groups, batch_sharding

# Sources of unit 0, as samples record them: the teacher; the checkpoint's first-frame model; a picture for each prompt.
GENERATED, DRAWN, PICTURES = 'generated', 'model', 'pictures'
# By the few-step mode's source in generation.json, whose students learn from the samples.
SOURCES = {'denoiser': GENERATED, 'model': DRAWN}

Frames = Float[np.ndarray, 'B 1 H W 3']
# (numbers of the prompts, their texts with the modifier, keys [B] of the samples) -> frames in [-1, 1].
FirstFrames = Callable[[Sequence[int], Sequence[str], Array], Frames]


def first_frame_model(root: str | os.PathLike[str]) -> pathlib.Path:
    """Return the folder of a checkpoint's first-frame model; raise InputError if it has none."""
    try:
        return checkpoint.component_folder(root, folders.FIRST_FRAME_UNET)
    except InputError as error:
        raise InputError(
            f'--first-frame {DRAWN}: {error} Or give --first-frame DIR, a folder of pictures, or --first-frame '
            f'{GENERATED}, for students that generate the first frame, too.'
        ) from error


def given_frames(pictures: Sequence[pathlib.Path], size: tuple[int, int]) -> FirstFrames:
    """Return the source that shows the picture of each prompt.

    Args:
      size: of the videos: height, width.
    """

    def show(numbers: Sequence[int], texts: Sequence[str], keys: Array) -> Frames:
        del texts, keys
        return np.stack([picture_to_frame(read_image(pictures[number]), *size) for number in numbers])[:, None]

    return show


def drawn_frames(model: FirstFrameModel, size: tuple[int, int], mesh: Mesh) -> FirstFrames:
    """Return the source that draws a picture for each prompt, one at a time on every device.

    The keys are those of the samples, so that a video generated with the same seed, prompt and number has the same
    first frame.

    Args:
      size: of the videos: height, width.
      mesh: its data axes divide the batches.
    """
    groups, sharding = batch_groups(mesh), batch_sharding(mesh)
    shard = lambda tree: jax.device_put(tree, sharding)

    def draw(numbers: Sequence[int], texts: Sequence[str], keys: Array) -> Frames:
        del numbers
        parts = [slice(start, start + groups) for start in range(0, len(texts), groups)]
        pictures = [model(texts[part], DrawnPictureNoise(shard(keys[part])), shard) for part in parts]
        return to_frames(np.concatenate(pictures), *size)

    return draw
