"""Options of an export. The command module builds `ExportOptions`; the steps do not depend on the command line."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from export.graphs.table import DENOISER, GRAPH_SPECS
from export.quantize.adaround import GRAPHS as ADAROUND_GRAPHS
from export.quantize.adaround import AdaRound

if TYPE_CHECKING:
    from export.host.modules import ProgramOptions
    from export.host.recording import Scenes
    from export.qnn.chipsets import Target

# Default number of calibration samples for graphs without a number in the table.
_SAMPLES = 50


@dataclasses.dataclass(frozen=True)
class GraphOptions:
    """Options for the quantization, compilation and measurement of graphs.

    Attributes:
      out: parent folder of all steps.
      targets: chipsets; the simulator runs the binaries of the first.
      precisions: precisions of every graph; None uses the precision in `GRAPH_SPECS`.
      ranges: methods for activation ranges, from `ranges.METHODS`; the best of several is used.
      adaround: learned rounding for `adaround.GRAPHS`; None rounds all weights to nearest.
      two_parts: whether weights may be stored in two parts of 8 bits where the target requires it.
      calibration_samples: calls per quantized graph; None uses the number in `GRAPH_SPECS`.
      evaluation_samples: calls per graph and evaluation prompt that are measured on the CPU.
      simulated_samples: calls per graph that run on the HTP simulator: those with the lowest ratio on the CPU.
      simulate: whether binaries run on the HTP simulator.
      separate_contexts: whether each stage of the denoiser gets a separate binary.
      compare: whether to also compile separate binaries and a straightforward export for comparison.
    """

    out: pathlib.Path
    targets: Sequence[Target]
    precisions: Sequence[str] | None = None
    ranges: Sequence[str] = ('minmax',)
    adaround: AdaRound | None = None
    two_parts: bool = True
    calibration_samples: int | None = None
    evaluation_samples: int = 3
    simulated_samples: int = 2
    simulate: bool = True
    separate_contexts: bool = False
    compare: bool = False

    def adaround_of(self, name: str) -> AdaRound | None:
        """Return the learned rounding of a graph, or None."""
        return self.adaround if name in ADAROUND_GRAPHS else None

    def precisions_of(self, name: str) -> Sequence[str]:
        """Return the precisions that a graph is exported in."""
        return self.precisions or (GRAPH_SPECS[name].precision,)

    def samples_of(self, name: str) -> int:
        """Return the number of calibration calls of a graph; 0 if it is not quantized."""
        if 'w8a16' not in self.precisions_of(name):
            return 0
        return self.calibration_samples or GRAPH_SPECS[name].calibration_samples or _SAMPLES

    def shared(self, names: Sequence[str]) -> list[str]:
        """Return the exported graphs that share one binary: the denoiser's stages if there is more than one."""
        stages = [name for name in names if name.startswith(DENOISER)]
        return stages if len(stages) > 1 and not self.separate_contexts else []


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Options of an export: the program, its graphs, their calibration, and their compilation.

    Attributes:
      program: checkpoint, mode and video size.
      denoiser: the denoiser's component folder.
      names: graphs to export, in the table's order.
      graphs: options for the quantization, compilation and measurement of each graph.
      calibration: folder of the calibration set.
      scenes: calibration prompts, images and seed.
      validation: prompts that quantization settings are chosen on, disjoint from the calibration prompts.
      evaluation: prompts that ratios are reported on, disjoint from both.
      videos: number of calibration videos; None records as many as the calibration samples require.
      whole_video, simulate_video: whether whole videos are generated with the exported graphs, on the CPU and on the
        simulator.
      whole_videos: number of evaluation prompts for which whole videos are generated.
    """

    program: ProgramOptions
    denoiser: pathlib.Path
    names: Sequence[str]
    graphs: GraphOptions
    calibration: pathlib.Path
    scenes: Scenes
    validation: Scenes
    evaluation: Scenes
    videos: int | None = None
    whole_videos: int = 8
    whole_video: bool = True
    simulate_video: bool = False
