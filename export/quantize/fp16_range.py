"""Check that a graph stays inside the range of FP16, measured in float32 on the CPU.

The simulator and the phone compute in FP16, where a value beyond 65504 overflows to infinity. CPU execution in float32
does not show this.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from export.graphs.table import Feeds
from export.quantize.ranges import measure_extremes
from neodragon_jax.base.errors import InputError

LARGEST = float(np.finfo(np.float16).max)


class Peak(NamedTuple):
    """The largest magnitude in a graph and the name of the value or weight that has it."""

    name: str
    magnitude: float


def check_fp16_range(path: pathlib.Path, feeds: Iterable[Feeds]) -> Peak:
    """Return the peak of a float graph over recorded inputs.

    Raises:
      InputError: a value is NaN or beyond the range of FP16, or there are no recorded inputs.
    """
    graph = onnx.load(path, load_external_data=False).graph
    extremes = measure_extremes(path, feeds, sorted({node.op_type for node in graph.node}))
    peaks = [Peak(name, float(max(-low, high))) for name, (low, high) in extremes.items()]
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor, str(path.parent))
            peaks.append(Peak(tensor.name, float(np.abs(array).max(initial=0))))
    peak = max(peaks, key=lambda peak: peak.magnitude)
    # A comparison with NaN is false.
    if not all(entry.magnitude <= LARGEST for entry in peaks):
        worst = next((entry for entry in peaks if np.isnan(entry.magnitude)), peak)
        raise InputError(
            f'{path.name}: {worst.name} reaches {worst.magnitude:.3g}, beyond the {LARGEST:.0f} of FP16. '
            'Scale the weights that make it, as models of T5 need, or export the graph in w8a16.'
        )
    return peak
