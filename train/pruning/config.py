"""Options of the training of a pruned denoiser."""

from __future__ import annotations

import dataclasses

from neodragon_jax.base.errors import InputError
from train.runtime.settings import PathText, check_range, top_level

MAPPINGS = ('simple', 'next')
WEIGHTS = ('image_weight', 'text_weight', 'output_weight', 'data_weight')


@dataclasses.dataclass(frozen=True)
class PruningConfig:
    """Options of the objective, in addition to those of flow matching (`TeacherConfig`).

    Attributes:
      denoiser: component folder of the full denoiser.
      keep: blocks to keep, '0,1,2,4', or the keep.json of `train.prune`.
      start: component folder of the pruned denoiser to continue from; '' begins with the blocks of the full one.
      stage: 1, flow matching on data; or 2, feature matching as well.
      mapping: target of a kept block in stage 2: 'simple', the same block of the full denoiser; or 'next', the input of
        the next kept block.
      image_weight, text_weight: weights of the features of image and text tokens, in stage 2.
      output_weight, data_weight: weights of the flow's distance from the full denoiser's, and from the data's, in
        stage 2.
    """

    denoiser: PathText = top_level('')
    keep: str = top_level('')
    start: PathText = top_level('')
    stage: int = 1
    mapping: str = 'simple'
    image_weight: float = 1.0
    text_weight: float = 1.0
    output_weight: float = 1.0
    data_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.stage not in (1, 2):
            raise InputError(f'stage is {self.stage}; use 1 or 2.')
        if self.mapping not in MAPPINGS:
            raise InputError(f'mapping is {self.mapping!r}; use one of {", ".join(MAPPINGS)}.')
        check_range(self, *WEIGHTS, least=0)
