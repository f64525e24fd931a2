"""Estimates of a graph's latency on a Snapdragon 8 Elite, from what its operations write.

Two models, because they disagree and no phone is at hand to say which is nearer: quote both, and call them estimates.
Both were fitted to measurements of the 1728-token denoiser stage on that chipset (HTP v79).

  flat           0.105 ms per megabyte that operations write, whatever they are.
  by operation   attention scores by what each operation on them took, in cycles per byte; the rest flat.

They say nothing about a graph's load time, or about what is bound by arithmetic instead of bytes.
"""

from __future__ import annotations

import dataclasses

from export.qnn.static_view import StaticView

MS_PER_MB = 0.105
CLOCK_MHZ = 1500.0
# Cycles per byte written, on scores [24, 1728, 1728] of 16 bits.
SCORE_CYCLES = {'Softmax': 0.221, 'MatMul': 0.0187}
OTHER_SCORE_CYCLES = 0.0103


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Milliseconds on a Snapdragon 8 Elite by either model; not measurements."""

    flat_ms: float
    by_operation_ms: float

    @property
    def worst_ms(self) -> float:
        """The greater of the two."""
        return max(self.flat_ms, self.by_operation_ms)


def estimate(view: StaticView) -> Estimate:
    """Return both estimates for a graph whose activations have 16 bits."""
    scores = sum(view.score_mb.values())
    cycles = sum(size * 1e6 * SCORE_CYCLES.get(kind, OTHER_SCORE_CYCLES) for kind, size in view.score_mb.items())
    return Estimate(
        flat_ms=MS_PER_MB * view.moved_mb,
        by_operation_ms=MS_PER_MB * (view.moved_mb - scores) + cycles / (CLOCK_MHZ * 1e3),
    )
