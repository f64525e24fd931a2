"""Profile of a run: a table of the time of each module and the peak memory of the process.

The pipeline takes its modules as functions; a profile wraps them. A wrapped function waits for its result, so a run
without a profile is faster.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from neodragon_jax.base.memory import peak_memory_bytes
from neodragon_jax.generation import first_frame, pipeline

UPSCALER = 'upscaler'  # in a store

_HEADER = """\
| module | calls | first call, s | later calls, mean s | tokens | parameters |
|:--|--:|--:|--:|--:|--:|
"""
_NOTE = (
    'The first call includes compilation; with --low-memory, the call after each loading includes that. '
    'Tokens are those of one video in one call: text, history and the current unit.'
)


@dataclasses.dataclass
class Row:
    """Measurements of one module.

    Attributes:
      held: its name in the store, where its size is known.
      seconds: duration of every call.
      tokens: tokens per call and video; 0 where there are none.
    """

    held: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0


@dataclasses.dataclass
class Profile:
    """Measurements of a run, by the module's name, in the order of first use."""

    rows: dict[str, Row] = dataclasses.field(default_factory=dict)

    def timed(
        self,
        function: Callable[..., Any],
        held: str,
        describe: Callable[..., tuple[str, int]] | None = None,
    ) -> Callable[..., Any]:
        """Return a function that also records the time of its calls.

        Args:
          held: the module's name in the store.
          describe: from the function's arguments to the row's name and tokens; default: one row named `held`.
        """

        def measured(*args: Any) -> Any:
            name, tokens = describe(*args) if describe else (held, 0)
            jax.block_until_ready(args)
            start = time.perf_counter()
            result = jax.block_until_ready(function(*args))
            row = self.rows.setdefault(name, Row(held))
            row.seconds.append(time.perf_counter() - start)
            row.tokens = max(row.tokens, tokens)
            return result

        return measured

    def components(self, parts: pipeline.Components) -> pipeline.Components:
        """Return the pipeline's modules, measured; the denoiser has one row per stage."""

        def stage_row(
            stage: int, history: Sequence[Any], x: Any, unit: Any, prompt: pipeline.Prompt, timestep: Any
        ) -> tuple[str, int]:
            pixels = sum(clip.shape[1] * clip.shape[2] * clip.shape[3] for clip in (*history, x))
            return f'denoiser, stage {stage}', prompt.text.shape[1] + pixels // parts.patch**2

        def decoder_row(*_: Any) -> tuple[str, int]:
            return 'video decoder, per latent frame', 0

        return dataclasses.replace(
            parts,
            encode_prompt=self.timed(parts.encode_prompt, pipeline.TEXT_ENCODERS),
            encode_image=self.timed(parts.encode_image, pipeline.VIDEO_ENCODER),
            denoise=self.timed(parts.denoise, pipeline.DENOISER, stage_row),
            decode_step=self.timed(parts.decode_step, pipeline.VIDEO_DECODER, decoder_row),
        )

    def first_frame(self, model: first_frame.FirstFrameModel) -> first_frame.FirstFrameModel:
        """Return the first-frame model with its modules measured."""

        def step_row(*_: Any) -> tuple[str, int]:
            return f'{first_frame.UNET}, per step', 0

        return dataclasses.replace(
            model,
            encode_prompt=self.timed(model.encode_prompt, first_frame.TEXT_ENCODERS),
            denoise=self.timed(model.denoise, first_frame.UNET, step_row),
            decode=self.timed(model.decode, first_frame.DECODER),
        )

    def report(self, sizes: Mapping[str, int]) -> str:
        """Return the table and the peak memory as Markdown.

        Args:
          sizes: bytes of parameters by the name in the store.
        """
        lines = []
        for name, row in self.rows.items():
            later = row.seconds[1:]
            mean = f'{math.fsum(later) / len(later):.4f}' if later else '-'
            size = f'{sizes[row.held] / 1e6:,.1f} MB' if row.held in sizes else '-'
            lines.append(
                f'| {name} | {len(row.seconds)} | {row.seconds[0]:.3f} | {mean} | {row.tokens or "-"} | {size} |'
            )
        return _HEADER + '\n'.join(lines) + f'\n\n{_NOTE}\n\n{peak_memory()}\n'


def peak_memory() -> str:
    """Return one line with the peak memory of this process, on the host and on each device that reports it."""
    parts = [f'host {peak_memory_bytes() / 1e9:.2f} GB']
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        if 'peak_bytes_in_use' in stats:
            parts.append(f'{device.platform} {device.id} {stats["peak_bytes_in_use"] / 1e9:.2f} GB')
    return 'Peak memory: ' + ', '.join(parts) + '.'
