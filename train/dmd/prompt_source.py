"""Prompts and first frames as training samples: the student's own roll-outs take the place of the teacher's videos.

Legend: T latent frames, H W latent grid, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from neodragon_jax.base.errors import InputError
from train.data import Source
from train.data.sources import identity


class PromptSource:
    """Samples whose latents are a first frame, followed by zeros, as a `Source`."""

    def __init__(self, source: Source, frames: int) -> None:
        """Wrap samples with latents [1, H, W, C], or longer ones of which only the first frame is used.

        Args:
          frames: T of the videos that the student generates.
        """
        self._source, self._frames = source, frames

    def __len__(self) -> int:
        return len(self._source)

    @property
    def identity(self) -> str:
        """See `train.data.sources.identity`."""
        return identity(self._source)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        sample = dict(self._source[index])
        first = np.asarray(sample['latents'])[:1]
        latents = np.zeros((self._frames, *first.shape[1:]), first.dtype)
        latents[:1] = first
        return sample | {'latents': latents}


def check_prompt_only(
    protocol: str, own_history: tuple[float, float], arrive: bool, regression: bool, adversarial: bool, videos: int
) -> None:
    """Raise InputError if a recipe needs videos of the data.

    Args:
      own_history: first and last share of the examples with the student's own history.
      arrive: whether these examples start at the student's own states; a noisy latent of the data would be of no video.
      regression, adversarial: whether these objectives use the data.
      videos: samples held out for the evaluation, which compares with the teacher's videos.
    """
    problems = {
        'protocol must be "18": the data gives the first frame': protocol != '18',
        'own_history.first and last must be 1': own_history != (1.0, 1.0),
        'own_history.arrive must be True': not arrive,
        'objectives.regression.weight must be 0': regression,
        'objectives.adversarial.weight must be 0': adversarial,
        'evaluation.videos must be 0': videos > 0,
    }
    wrong = [problem for problem, there in problems.items() if there]
    if wrong:
        raise InputError(f'config.dmd.input is "prompts", without videos to learn from: {"; ".join(wrong)}.')
