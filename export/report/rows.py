"""The results of an export, row by row."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from export.measure.resources import Resources

# Keys of Row.resources.
STEPS = ('float graph', 'quantize', 'compile', 'simulate')


@dataclasses.dataclass(frozen=True)
class Row:
    """One graph at one precision on one chipset. All ratios are in dB against JAX in float32.

    Attributes:
      ships: whether this is the precision that the graph ships with.
      operations: nodes of the float ONNX graph.
      target_db: lowest acceptable ratio.
      onnx_db: lowest ratio of the float ONNX graph on the CPU.
      prompts_db: lowest ratio of the W8A16 graph on the CPU for each evaluation prompt; empty for FP16, which the CPU
        does not emulate.
      htp_db: lowest ratio of the context binary on the HTP simulator; None if it was not run.
      doubled_weights: number of weights in two parts of 8 bits.
      ranges_db: ratio on calibration calls with each rule for activation ranges, if several were compared.
      rounding_db: ratio on calibration calls with weights rounded to nearest and by AdaRound, if that was asked for.
      qnn_operations, moved_mb, transposes, transposed_mb, float_operations: static view of the compiled graph: its
        operations, the bytes that they write, and how many left fixed point in W8A16.
      binary_mb: size of the context binary.
      shared: whether that binary holds other graphs, too; size and compile resources are then those of all.
      estimated_ms: estimated latency on a Snapdragon 8 Elite, see qnn/latency.py; not measured.
      resources: time and memory of each step, see STEPS; None for a step that was not done.
      paper_ms: latency that the paper measured, by chipset.
    """

    graph: str
    precision: str
    chipset: str
    ships: bool
    operations: int
    target_db: float
    onnx_db: float
    prompts_db: Mapping[str, float]
    htp_db: float | None
    doubled_weights: int
    ranges_db: Mapping[str, float]
    rounding_db: Mapping[str, float]
    qnn_operations: int
    moved_mb: float
    transposes: int
    transposed_mb: float
    float_operations: int
    binary_mb: float
    shared: bool
    estimated_ms: Mapping[str, float]
    resources: Mapping[str, Resources | None]
    paper_ms: Mapping[str, float | None]

    @property
    def label(self) -> str:
        """Graph, precision and chipset."""
        return f'{self.graph}, {self.precision}, {self.chipset}'

    @property
    def lowest_db(self) -> float | None:
        """Lowest ratio on the CPU over the evaluation prompts."""
        return min(self.prompts_db.values(), default=None)

    @property
    def median_db(self) -> float | None:
        """Median over the evaluation prompts of their lowest ratio on the CPU."""
        return statistics.median(self.prompts_db.values()) if self.prompts_db else None

    @property
    def deploy_db(self) -> float | None:
        """Lowest ratio that was measured, on the CPU or on the simulator."""
        return min((db for db in (self.lowest_db, self.htp_db) if db is not None), default=None)

    @property
    def met(self) -> bool | None:
        """Whether the lowest ratio meets the target; None if nothing was measured."""
        return None if self.deploy_db is None else self.deploy_db >= self.target_db


@dataclasses.dataclass(frozen=True)
class VideoRow:
    """Whole generations against JAX in float32, one per evaluation prompt.

    Attributes:
      graphs: label of the part that ran as exported graphs.
      runner: label of the runtime.
      latents_db: for each prompt, the ratio of all generated latent frames.
      last_db: for each prompt, the ratio of the last latent frame, in which all errors accumulate.
      frames_db: for each prompt, the ratio of the video's bytes, which are rounded; empty if videos are not decoded.
    """

    graphs: str
    runner: str
    latents_db: Mapping[str, float]
    last_db: Mapping[str, float]
    frames_db: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class SharedBinary:
    """One context binary of several graphs.

    Attributes:
      binary_mb: size of the binary.
      constants_mb: sum of the constants of all graphs: a lower bound on the size of separate binaries.
      separate_mb: sum of the sizes of separate binaries; None if they were not compiled.
      compile_s, peak_gb: time and memory of compiling all graphs in one process.
    """

    graphs: Sequence[str]
    precision: str
    chipset: str
    binary_mb: float
    constants_mb: float
    separate_mb: float | None
    compile_s: float
    peak_gb: float
