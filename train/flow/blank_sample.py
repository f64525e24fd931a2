"""The shape of a training sample, for plans and sizing without data."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlankSample:
    """Sizes of a training sample: the section `blank_sample` of a settings file.

    Attributes:
      frames, height, width: T, H, W of the latents.
      text_tokens: L, tokens of the text states.
    """

    frames: int
    height: int
    width: int
    text_tokens: int
