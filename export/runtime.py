"""Exported graphs as the denoiser that the sampler takes: ONNX Runtime on the CPU, or QNN's HTP simulator.

Legend: B batch, h w a stage's grid, C channels.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from export.graphs import DenoiserHost
from neodragon_jax.layout import unpatchify
from neodragon_jax.sampler import Prompt, Unit


class GraphRunner(Protocol):
    """Runs one graph: `OnnxSession` or `htp.HtpSession`."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        ...


class OnnxSession:
    """A float or W8A16 graph on ONNX Runtime's CPU provider."""

    def __init__(self, path: pathlib.Path) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        self._names = [value.name for value in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        arrays = [np.asarray(array) for array in self._session.run(self._names, dict(feeds))]
        return dict(zip(self._names, arrays, strict=True))


class GraphDenoiser:
    """`sampler.Denoiser` over one exported graph per stage; the host's half runs in JAX."""

    def __init__(self, host: DenoiserHost, runners: Sequence[GraphRunner]) -> None:
        self._host = host
        self._runners = runners

    def __call__(
        self, stage: int, history: Sequence[Unit], x: Unit, unit: Array, prompt: Prompt, timestep: Array
    ) -> Unit:
        """Return the flow of `x` in float32; the graphs take one example at a time."""
        flows = []
        for index in range(x.shape[0]):
            one = slice(index, index + 1)
            example = Prompt(*(field[one] for field in prompt))
            feeds = self._host.stage_inputs([clip[one] for clip in history], x[one], unit[one], example, timestep[one])
            flows.append(self._runners[stage].run(feeds)['flow'])
        patch = self._host.patch
        grid = (x.shape[2] // patch, x.shape[3] // patch)
        return unpatchify(jnp.asarray(np.stack(flows), jnp.float32), patch, grid)
