"""Sizes of the compared models and batches, and the results of one worker."""

from __future__ import annotations

import dataclasses
from typing import Any

from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.pyramid.history import envelope

STAGES = 3
DENOISER, DISTILLATION = 'denoiser', 'distillation'


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options that both sides share; a request to a worker.

    Attributes:
      layers, heads, head_dim, pooled: of the denoiser.
      frames, height, width: of the latents.
      text_tokens: tokens of the text states.
      batch: samples in a call of the denoiser, and in each update of the distillation.
      dtype: compute type, 'bfloat16' or 'float32'; trained parameters and optimizer states are float32.
      fake_updates: updates of the fake score in a step.
      stages: stages to measure.
      repeats: measured runs, after one that is not counted.
    """

    layers: int = 18
    heads: int = 24
    head_dim: int = 64
    pooled: int = 2048
    frames: int = 7
    height: int = 40
    width: int = 64
    text_tokens: int = 128
    batch: int = 8
    dtype: str = 'bfloat16'
    fake_updates: int = 2
    stages: tuple[int, ...] = (0, 1, 2)
    repeats: int = 3

    @property
    def config(self) -> MMDiTConfig:
        """The sizes of the denoiser."""
        return MMDiTConfig(
            num_layers=self.layers,
            num_attention_heads=self.heads,
            attention_head_dim=self.head_dim,
            caption_projection_dim=self.heads * self.head_dim,
            pooled_projection_dim=self.pooled,
        )

    def tokens(self, stage: int) -> tuple[int, int]:
        """Return the image tokens of a call at a stage: (with the history, of the current unit)."""
        patch = self.config.patch_size
        grid = (self.height // patch, self.width // patch)
        layout = envelope(stage, self.frames - 1, STAGES, grid, self.text_tokens)
        return layout.image_tokens, layout.current_tokens

    def to_json(self) -> dict[str, Any]:
        """Return the case as JSON values, with the tokens of its stages and the size of a patch."""
        tokens = {str(stage): list(self.tokens(stage)) for stage in self.stages}
        return dataclasses.asdict(self) | {'tokens': tokens, 'patch_dim': self.config.patch_dim}


# The miniature of the rehearsal on a CPU.
TINY = Case(
    layers=2, heads=4, head_dim=16, pooled=48, frames=3, height=8, width=8, text_tokens=16, batch=2, dtype='float32',
    repeats=2,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Measured:
    """The results of one worker.

    Attributes:
      device: kind of the device.
      versions: versions of the packages.
      parameters: of one denoiser, without its fixed table of positions.
      seconds: of each measured run, by '{denoiser|distillation}/{stage}'.
      compile_s: seconds of the first run of each.
      peak_gb: largest memory of the device in 10^9 bytes; None if it does not report it.
    """

    device: str
    versions: dict[str, str]
    parameters: int
    seconds: dict[str, list[float]]
    compile_s: dict[str, float]
    peak_gb: float | None
