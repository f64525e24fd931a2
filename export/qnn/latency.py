"""Estimated latency of a graph on a Snapdragon 8 Elite: one number with an error band, fitted to measured graphs.

Two cost models are based on the bytes that operations write. Both come from measurements of the 1728-token denoiser
stage on HTP v79.

  flat           0.105 ms per megabyte, for every operation.
  by operation   attention scores in cycles per byte, by operation; all other bytes at the flat rate.

The flat model alone failed on a device: it predicted 28% less time for a change that saved 4.4%. The estimate is
therefore the by-operation model times a factor: the geometric mean of measured over modeled time for the denoiser's
three stages, in the paper and in an independent port. The error band spans the smallest and the largest of these
ratios. The measured graphs compute the same function but are other implementations, which widens the band.

Load time and compute-bound graphs are outside the model.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping

from export.qnn.static_view import StaticView

MS_PER_MB = 0.105
CLOCK_MHZ = 1500.0
# Cycles per byte written, on scores [24, 1728, 1728] of 16 bits.
SCORE_CYCLES = {'Softmax': 0.221, 'MatMul': 0.0187}
OTHER_SCORE_CYCLES = 0.0103


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measured latency of a denoiser stage on a Snapdragon 8 Elite, and the modeled cost of this project's graph.

    Attributes:
      source: origin of the measurement.
      stage: number of the denoiser's stage.
      ms: measured latency.
      moved_mb, score_mb: megabytes that the graph writes at full size, and the attention scores among them.
      by_operation_ms: latency of the graph in the by-operation model.
    """

    source: str
    stage: int
    ms: float
    moved_mb: float
    score_mb: float
    by_operation_ms: float

    @property
    def ratio(self) -> float:
        """Measured over modeled time."""
        return self.ms / self.by_operation_ms


# Paper: arXiv 2511.06055, table 9. Port: the released weights on a Galaxy S25 Ultra, 2026. Source of the bytes and
# modeled times: the full-size export in docs/full_size_export.md.
MEASURED = (
    Measured('paper', 0, 104.7, 1109, 249, 110),
    Measured('paper', 1, 218.3, 1927, 516, 189),
    Measured('paper', 2, 938.3, 7246, 3467, 674),
    Measured('port', 0, 169.0, 1109, 249, 110),
    Measured('port', 1, 376.0, 1927, 516, 189),
    Measured('port', 2, 1851.0, 7246, 3467, 674),
)
_RATIOS = [graph.ratio for graph in MEASURED]
FACTOR, LOW, HIGH = statistics.geometric_mean(_RATIOS), min(_RATIOS), max(_RATIOS)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimated (not measured) latency on a Snapdragon 8 Elite, in milliseconds.

    Attributes:
      flat_ms, by_operation_ms: latency in each of the two cost models.
    """

    flat_ms: float
    by_operation_ms: float

    @property
    def ms(self) -> float:
        """The estimate."""
        return FACTOR * self.by_operation_ms

    @property
    def low_ms(self) -> float:
        """Lower end of the error band."""
        return LOW * self.by_operation_ms

    @property
    def high_ms(self) -> float:
        """Upper end of the error band."""
        return HIGH * self.by_operation_ms

    def __str__(self) -> str:
        return show(self.to_json())

    def to_json(self) -> dict[str, float]:
        """Return the estimate, its band and both model latencies for the metadata of a binary."""
        band = {'ms': self.ms, 'low_ms': self.low_ms, 'high_ms': self.high_ms}
        return band | {'flat_ms': self.flat_ms, 'by_operation_ms': self.by_operation_ms}

    @property
    def worst_ms(self) -> float:
        """The greater latency of the two models."""
        return max(self.flat_ms, self.by_operation_ms)


def estimate(view: StaticView) -> Estimate:
    """Estimate the latency of a graph with 16-bit activations."""
    scores = sum(view.score_mb.values())
    cycles = sum(size * 1e6 * SCORE_CYCLES.get(kind, OTHER_SCORE_CYCLES) for kind, size in view.score_mb.items())
    return Estimate(
        flat_ms=MS_PER_MB * view.moved_mb,
        by_operation_ms=MS_PER_MB * (view.moved_mb - scores) + cycles / (CLOCK_MHZ * 1e3),
    )


def show(estimated: Mapping[str, float]) -> str:
    """Format an estimate and its band, as returned by `Estimate.to_json`, for a table."""
    digits = 0 if estimated['ms'] >= 10 else 2
    return f'{estimated["ms"]:.{digits}f} ({estimated["low_ms"]:.{digits}f} to {estimated["high_ms"]:.{digits}f})'
