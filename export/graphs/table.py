"""The table of graphs that run on the phone, and what a graph is.

A graph is a function of arrays of static shape, closed over its parameters. What depends on the prompt, the timestep
or the place in the video only (masks, rotary tables, token embeddings) the host computes in float32 and passes in: the
graphs then hold no index arithmetic. Source: arXiv 2511.06055, section 4 and tables 7 and 9.
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

# What the names of the denoiser's graphs begin with; the stage follows.
DENOISER = 'denoiser_stage'

# Added to forbidden scores on the phone: leaks exp(-100), and spans little of a 16-bit range.
FORBIDDEN = -100.0


@dataclasses.dataclass(frozen=True)
class Deployment:
    """How a graph ships, and how faithful it must be.

    Attributes:
      precision: 'w8a16' (8-bit weights, 16-bit activations) or 'fp16'.
      target_db: lowest signal-to-noise ratio against JAX in float32, of the outputs that it is judged by.
      calibration_samples: inputs that the ranges of activations are measured on.
      x_elite_ms, elite_8_ms: latency that the paper reports on Snapdragon X Elite and on 8 Elite; None if it has none.
    """

    precision: str
    target_db: float
    calibration_samples: int = 0
    x_elite_ms: float | None = None
    elite_8_ms: float | None = None


# THE table (arXiv 2511.06055, tables 7 and 9). The paper has no targets for what ships in FP16, nor a row for the text
# towers of the first frame, and counts context adapter and modulation with the denoiser: those targets are ours. Its
# latency of the video decoder is that of a whole video, seven steps. A new module needs a row here and an entry in
# `modules.phone_modules`.
DEPLOYMENTS: dict[str, Deployment] = {
    'clip_l': Deployment('fp16', 40.0, x_elite_ms=5.9, elite_8_ms=14.0),
    'clip_g': Deployment('fp16', 40.0, x_elite_ms=43.6, elite_8_ms=76.5),
    'dt5': Deployment('fp16', 40.0, x_elite_ms=3.0, elite_8_ms=3.5),
    'context_adapter': Deployment('fp16', 35.0),
    'first_frame_clip_l': Deployment('fp16', 40.0),
    'first_frame_clip_g': Deployment('fp16', 40.0),
    'first_frame_unet': Deployment('w8a16', 33.0, 500, x_elite_ms=151.5, elite_8_ms=234.6),
    'first_frame_decoder': Deployment('w8a16', 31.0, 500, x_elite_ms=378.6, elite_8_ms=580.0),
    'video_encoder': Deployment('w8a16', 40.0, 50, x_elite_ms=941.7, elite_8_ms=1206.5),
    'denoiser_modulation': Deployment('fp16', 40.0),
    'denoiser_stage0': Deployment('w8a16', 29.0, 300, x_elite_ms=54.9, elite_8_ms=104.7),
    'denoiser_stage1': Deployment('w8a16', 22.0, 300, x_elite_ms=101.4, elite_8_ms=218.3),
    'denoiser_stage2': Deployment('w8a16', 24.0, 300, x_elite_ms=590.2, elite_8_ms=938.3),
    'video_decoder': Deployment('w8a16', 35.0, 50, x_elite_ms=143.0, elite_8_ms=248.9),
    'super_resolution': Deployment('w8a16', 48.0, 500, x_elite_ms=4.9, elite_8_ms=6.5),
}


@dataclasses.dataclass(frozen=True)
class Graph:
    """One function for the phone.

    Attributes:
      name: its row in `DEPLOYMENTS`.
      function: takes the inputs in order; returns the output, or a tuple of all outputs.
      inputs: float32 inputs and their shapes.
      output: name of the first output.
      more_outputs: names of the others.
      judged_by_all: whether the graph is judged by all its outputs, not by the first alone.
      gelu_floor: inputs of GELUs are kept above this; None leaves them.
    """

    name: str
    function: Callable[..., Any]
    inputs: Mapping[str, tuple[int, ...]]
    output: str
    more_outputs: tuple[str, ...] = ()
    gelu_floor: float | None = None
    judged_by_all: bool = False

    @property
    def deployment(self) -> Deployment:
        """The graph's row in the table."""
        return DEPLOYMENTS[self.name]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of all outputs, in order."""
        return (self.output, *self.more_outputs)

    @property
    def judged(self) -> tuple[str, ...]:
        """Names of the outputs that the graph is judged by."""
        return self.outputs if self.judged_by_all else (self.output,)


@dataclasses.dataclass(frozen=True)
class Module:
    """A graph whose parameters are not read yet: run in JAX as it is, and closed over them to be exported.

    Attributes:
      name, inputs, output, more_outputs, gelu_floor: as in `Graph`.
      apply: (parameters, *inputs) -> the output, or a tuple of all outputs.
      read: returns the parameters, as float32 arrays on the host.
      folder: where they come from.
    """

    name: str
    apply: Callable[..., Any]
    read: Callable[[], Params]
    folder: pathlib.Path
    inputs: Mapping[str, tuple[int, ...]]
    output: str
    more_outputs: tuple[str, ...] = ()
    gelu_floor: float | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of all outputs, in order."""
        return (self.output, *self.more_outputs)

    def graph(self) -> Graph:
        """Read the parameters and return the function closed over them."""
        function = partial(self.apply, self.read())
        return Graph(self.name, function, self.inputs, self.output, self.more_outputs, self.gelu_floor)
