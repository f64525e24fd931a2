"""The denoiser's graphs: modulation, and one graph per stage."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from export.graphs.denoiser import Form, denoiser_graphs
from export.graphs.modulation import modulation_graph
from export.graphs.runners import GraphRunner
from export.graphs.stored_params import StoredParams
from export.graphs.table import DENOISER, MODULATION, Feeds, PhoneGraph
from export.host.denoiser_host import DenoiserHost, GraphDenoiser
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.pyramid.sampler import Plan


@dataclasses.dataclass(frozen=True)
class DenoiserGraphs:
    """The graphs of one denoiser at the sizes of a plan.

    Attributes:
      folder: the denoiser's component folder.
      plan: latent size and steps of the video.
      text_tokens: number of text tokens of a prompt.
      form: variant of the graphs.
    """

    folder: pathlib.Path
    plan: Plan
    text_tokens: int
    form: Form

    @property
    def config(self) -> MMDiTConfig:
        """Configuration of the model."""
        return self._model[0].config

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a full-size latent frame."""
        patch = self.config.patch_size
        return self.plan.height // patch, self.plan.width // patch

    @property
    def stages(self) -> int:
        """Number of pyramid stages."""
        return self.plan.schedule.stages

    def graph(self, name: str) -> PhoneGraph:
        """Return the modulation graph or the graph of a stage, by name."""
        if name == MODULATION:
            return modulation_graph(*self._model)
        return self._stage_graphs[int(name.removeprefix(DENOISER))]

    def host(self, modulate: Callable[[Feeds], Mapping[str, np.ndarray]] | None = None) -> DenoiserHost:
        """Return the host's part of the denoiser.

        Args:
          modulate: runs the modulation graph; None computes the modulation in JAX.
        """
        return DenoiserHost(*self._model, self.form, modulate)

    @functools.cached_property
    def jax_host(self) -> DenoiserHost:
        """The host's part, with the modulation in JAX."""
        return self.host()

    def denoiser(self, runners: Mapping[str, GraphRunner]) -> GraphDenoiser:
        """Return the denoiser over runners of the stage graphs, and of the modulation graph if there is one."""
        modulate = runners[MODULATION].run if MODULATION in runners else None
        return GraphDenoiser(self.host(modulate), [runners[f'{DENOISER}{stage}'] for stage in range(self.stages)])

    @functools.cached_property
    def _stage_graphs(self) -> Sequence[PhoneGraph]:
        return denoiser_graphs(*self._model, self.plan.frames - 1, self.grid, self.text_tokens, self.stages, self.form)

    @functools.cached_property
    def _model(self) -> tuple[PyramidMMDiT, Mapping[str, Any]]:
        # Parameters are read block by block: in float32 they take 6 GB at full size.
        stored = StoredParams(self.folder)
        assert isinstance(stored.module, PyramidMMDiT)
        return stored.module, stored


def check_denoiser(folder: pathlib.Path) -> None:
    """Raise InputError unless a folder holds a denoiser."""
    checkpoint.load_module(folder, PyramidMMDiT)
