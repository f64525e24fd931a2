"""Scenes of moving shapes as training samples, drawn when they are read.

Legend: T frames, H W pixels, N attributes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from neodragon_jax.base.errors import InputError
from train.shapes.captions import caption
from train.shapes.drawing import draw, track
from train.shapes.world import Scene, World

# fold_in tag of the wording: its random numbers are not those of the scene.
WORDING = 1


class MovingShapesSource:
    """Scenes of a world, drawn on access: a `Source` that needs no disk.

    A sample holds video uint8 [T, H, W, 3], prompt (str), attributes int32 [N] (`World.numbers`), combination (the row
    among `world.combinations('all')`, for tables with one row per caption), track [T, 2] and index.
    """

    def __init__(
        self,
        world: World,
        frames: int,
        size: tuple[int, int],
        seed: int = 0,
        count: int = 4096,
        split: str = 'train',
        paraphrase: bool = False,
    ) -> None:
        """Define the samples.

        Args:
          size: H, W.
          count: number of samples; it does not affect the cost.
          split: 'train', 'held_out' or 'all'.
          paraphrase: caption in random wordings instead of the canonical one.
        Raises:
          InputError: `count` is not positive, or there is no such split.
        """
        if count < 1:
            raise InputError(f'count is {count}; give at least 1.')
        self.world, self.frames, self.size, self.split = world, frames, size, split
        self._seed, self._count, self._paraphrase = seed, count, paraphrase
        world.combinations(split)
        self._rows = {traits: row for row, traits in enumerate(world.combinations('all'))}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        scene = self.scene(index)
        return {
            'video': draw(scene, self.frames, *self.size),
            'prompt': self.caption(index),
            'attributes': np.array(self.world.numbers(scene.traits), np.int32),
            'combination': np.int32(self._rows[scene.traits]),
            'track': track(scene, self.frames, *self.size),
            'index': index,
        }

    def scene(self, index: int) -> Scene:
        """Return the scene of a sample."""
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self.world.scene(self._seed, index, self.split)

    def caption(self, index: int) -> str:
        """Return the caption of a sample."""
        # Independent of the scene's random numbers, or a wording such as "little" would reveal the color.
        return caption(
            self.world.captioned(self.scene(index).traits), (self._seed, index, WORDING) if self._paraphrase else None
        )

    def metadata(self) -> dict[str, Any]:
        """Return JSON that is equal for sources of the same samples."""
        size = {'frames': self.frames, 'height': self.size[0], 'width': self.size[1]}
        options = {'seed': self._seed, 'count': self._count, 'split': self.split, 'paraphrase': self._paraphrase}
        world = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self.world).items()}
        return size | options | {'world': world}
