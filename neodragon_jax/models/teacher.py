"""The teacher: Pyramid-Flow's denoiser, which embeds the states of T5-XXL by one linear layer.

Neodragon replaces that layer by a context adapter and prunes the rest, so the denoiser itself is PyramidMMDiT.

Legend: B batch, C channels, F frames, L text tokens, D width, E width of the text states, p pooled width.
Source: Pyramid-Flow, arXiv 2410.05954; Neodragon, arXiv 2511.06055, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int

from neodragon_jax.config.pyramid_flow import TeacherMMDiTConfig
from neodragon_jax.models.mmdit import PyramidMMDiT


class TeacherMMDiT(nn.Module):
    """A denoiser and its context embedder; `params['denoiser']` alone are those of a PyramidMMDiT.

    Attributes:
      config: sizes.
      dtype, scan, remat, attention, rotary: as in PyramidMMDiT.
    """

    config: TeacherMMDiTConfig
    dtype: Any = None
    scan: bool = False
    remat: str = 'none'
    attention: str = 'masked'
    rotary: str = 'halves'

    def setup(self) -> None:
        init = nn.initializers.normal(0.02)
        self.context_embedder = nn.Dense(self.config.caption_projection_dim, dtype=self.dtype, kernel_init=init)
        self.denoiser = PyramidMMDiT(self.config, self.dtype, self.scan, self.remat, self.attention, self.rotary)

    def embed_text(self, states: Float[Array, 'B L E']) -> Float[Array, 'B L D']:
        """Return text states at the denoiser's width, the target of a distilled text encoder and its adapter."""
        return self.context_embedder(states)

    def __call__(
        self,
        clips: Sequence[Float[Array, 'B _ _ _ C']],
        states: Float[Array, 'B L E'],
        text_mask: Int[Array, 'B L'],
        pooled: Float[Array, 'B p'],
        timestep: Float[Array, ' B'],
        frame_ids: Int[Array, 'B F'] | None = None,
    ) -> Float[Array, 'B _ _ _ C']:
        """Return the flow of the last clip.

        Args:
          states: prompt states of T5-XXL, or of another encoder of that width.
          clips, text_mask, pooled, timestep, frame_ids: as in PyramidMMDiT.
        Raises:
          InputError: there is no clip or a clip cannot be cut into patches.
        """
        return self.denoiser(clips, self.embed_text(states), text_mask, pooled, timestep, frame_ids)
