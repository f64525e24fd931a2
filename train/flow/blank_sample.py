"""The shape of a training sample, for plans and sizing without data."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlankSample:
    """Sizes of a training sample: the section `blank_sample` of a settings file.

    Attributes:
      frames: T, latent frames.
      height, width: H and W of the latent grid.
      text_tokens: L, tokens of the text states.
    """

    frames: int
    height: int
    width: int
    text_tokens: int
