"""`PhoneGraph`, the type of all graphs that run on the phone, and the table of their precisions and targets.

The host computes in float32 everything that depends only on the prompt, the timestep or the position in the video
(masks, rotary tables, token embeddings) and passes it in, so that graphs hold no index arithmetic.
Source: arXiv 2511.06055, section 4 and tables 7 and 9.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

Params = Mapping[str, Any]
Feeds = dict[str, np.ndarray]

# Prefix of the names of the denoiser's graphs; the number of the stage follows.
DENOISER = 'denoiser_stage'
MODULATION = 'denoiser_modulation'  # of all stages

# Lowest acceptable ratio of the last latent frame of a video, in which the errors of all calls accumulate.
VIDEO_TARGET_DB = 25.0

# Bias of masked attention scores on the phone: masked weights are about exp(-100), and the 16-bit range stays small.
FORBIDDEN = -100.0


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """Precision and accuracy target of a graph.

    Attributes:
      precision: 'w8a16' (8-bit weights, 16-bit activations) or 'fp16'.
      target_db: lowest acceptable signal-to-noise ratio of the compared outputs against JAX in float32.
      calibration_samples: number of recorded inputs that the ranges of activations are measured on.
      x_elite_ms, elite_8_ms: latency in the paper on Snapdragon X Elite and on 8 Elite; None if it gives none.
    """

    precision: str
    target_db: float
    calibration_samples: int = 0
    x_elite_ms: float | None = None
    elite_8_ms: float | None = None


# Source: arXiv 2511.06055, tables 7 and 9. This project set the targets that the paper does not give: those of FP16
# graphs, of the first frame's text towers, and of context adapter and modulation, which the paper counts with the
# denoiser. The paper's latency of the video decoder is that of a whole video, seven calls. A new graph needs a row here
# and an entry in `export.host.modules.phone_modules`.
GRAPH_SPECS: dict[str, GraphSpec] = {
    'clip_l': GraphSpec('fp16', 40.0, x_elite_ms=5.9, elite_8_ms=14.0),
    'clip_g': GraphSpec('fp16', 40.0, x_elite_ms=43.6, elite_8_ms=76.5),
    'dt5': GraphSpec('fp16', 40.0, x_elite_ms=3.0, elite_8_ms=3.5),
    'context_adapter': GraphSpec('fp16', 35.0),
    'first_frame_clip_l': GraphSpec('fp16', 40.0),
    'first_frame_clip_g': GraphSpec('fp16', 40.0),
    'first_frame_unet': GraphSpec('w8a16', 33.0, 500, x_elite_ms=151.5, elite_8_ms=234.6),
    'first_frame_decoder': GraphSpec('w8a16', 31.0, 500, x_elite_ms=378.6, elite_8_ms=580.0),
    'video_encoder': GraphSpec('w8a16', 40.0, 50, x_elite_ms=941.7, elite_8_ms=1206.5),
    'denoiser_modulation': GraphSpec('fp16', 40.0),
    'denoiser_stage0': GraphSpec('w8a16', 29.0, 300, x_elite_ms=54.9, elite_8_ms=104.7),
    'denoiser_stage1': GraphSpec('w8a16', 22.0, 300, x_elite_ms=101.4, elite_8_ms=218.3),
    'denoiser_stage2': GraphSpec('w8a16', 24.0, 300, x_elite_ms=590.2, elite_8_ms=938.3),
    'video_decoder': GraphSpec('w8a16', 35.0, 50, x_elite_ms=143.0, elite_8_ms=248.9),
    'super_resolution': GraphSpec('w8a16', 48.0, 500, x_elite_ms=4.9, elite_8_ms=6.5),
}


@dataclasses.dataclass(frozen=True)
class PhoneGraph:
    """A function for the phone: static shapes, named float32 inputs, and parameters that are read on demand.

    Attributes:
      name: its row in `GRAPH_SPECS`, unless it is a piece of another graph.
      apply: (parameters, *inputs in order) -> the output, or a tuple of all outputs.
      inputs: shape of each input.
      outputs: names, in order.
      read: returns the parameters as float32 arrays on the host.
      folder: component folder of the parameters; None for the denoiser's graphs, whose `apply` reads them itself.
      gelu_floor: lower bound for the inputs of GELUs; None sets no bound.
      compares_all_outputs: whether all outputs are compared with JAX, not only the first.
      pieces: graphs that form this one as a chain. A piece reads graph inputs and outputs of earlier pieces by name.
      fused: whether the quantized graph is rewritten by `export.rewrite.for_htp`.
      in_two_parts: whether all layers of a piece store their weights in two parts of 8 bits when quantized.
    """

    name: str
    apply: Callable[..., Any]
    inputs: Mapping[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    read: Callable[[], Params] = dict
    folder: pathlib.Path | None = None
    gelu_floor: float | None = None
    compares_all_outputs: bool = False
    pieces: tuple[PhoneGraph, ...] = ()
    fused: bool = False
    in_two_parts: bool = False

    @property
    def spec(self) -> GraphSpec:
        """The graph's row in the table."""
        return GRAPH_SPECS[self.name]

    @property
    def compared(self) -> tuple[str, ...]:
        """Names of the outputs that are compared with JAX."""
        return self.outputs if self.compares_all_outputs else self.outputs[:1]

    def close(self) -> Callable[..., Any]:
        """Read the parameters and return the function closed over them."""
        return partial(self.apply, self.read())
