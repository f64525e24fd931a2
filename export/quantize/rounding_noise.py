"""The error that rounding each weight of a float graph to 8 bits causes, measured weight by weight or in groups.

A small graph is measured weight by weight. A large graph, whose runs take long, is measured in groups of neighboring
weights; the worst groups are halved until `RUNS` runs are used.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from export.graphs.runners import Call
from export.graphs.table import Feeds
from export.graphs.to_onnx import save
from export.measure.resources import inner_bar
from export.measure.snr import join_outputs
from export.quantize.adaround import Rounding
from export.rewrite.onnx_graph import constants_of

# Runs of the float graph to measure contributions to the error; a run at full size takes up to half a minute.
RUNS = 16
_INT8 = 127
# Kind of layer -> axis of the output channels in its weight.
LAYER_AXES = {'Conv': 0, 'Gemm': 1}


@dataclasses.dataclass(frozen=True)
class Group:
    """Neighboring weights of a graph and the error of rounding them.

    Attributes:
      names: names of the constants.
      size: number of values; equals the bytes at 8 bits and the cost of second parts in bytes.
      noise: squared error of the compared outputs when these weights alone are rounded.
    """

    names: tuple[str, ...]
    size: int
    noise: float


def rounding_noise(
    source: pathlib.Path, call: Call, compared: Sequence[str], rounding: Rounding | None = None, runs: int = RUNS
) -> list[Group]:
    """Return all weights of a float graph in groups, each with the error of rounding it to 8 bits.

    Args:
      runs: maximum number of runs of the graph; if it is at least the number of weights, each weight is a group.
    """
    model = onnx.load(source, load_external_data=False)
    constants = constants_of(model.graph)
    axes = {
        node.input[1]: LAYER_AXES[node.op_type]
        for node in model.graph.node
        if node.op_type in LAYER_AXES and node.input[1] in constants
    }
    session = _replaceable(source, model, axes)

    def run(feeds: Feeds) -> np.ndarray:
        outputs = (np.asarray(array) for array in session.run(list(compared), feeds))
        return join_outputs(dict(zip(compared, outputs, strict=True)), compared).astype(np.float64)

    def stored(name: str) -> np.ndarray:
        if rounding is not None and name in rounding.levels:
            return rounding.value(name)
        return rounded(numpy_helper.to_array(constants[name], str(source.parent)), axes[name])

    exact = run(call.inputs)

    with inner_bar('shares of the error', min(runs, len(axes))) as on_run:

        def measure(names: Sequence[str]) -> Group:
            got = run(call.inputs | {name: stored(name) for name in names})
            size = sum(math.prod(constants[name].dims) for name in names)
            on_run()
            return Group(tuple(names), size, float(np.square(got - exact).sum()))

        return _worst_apart(list(axes), measure, runs)


def _worst_apart(names: Sequence[str], measure: Callable[[Sequence[str]], Group], runs: int) -> list[Group]:
    """Return groups of neighbors; the noisiest are halved as long as runs remain to measure the halves."""
    first = len(names) if len(names) <= runs else max(1, runs // 2)
    groups = [measure(part) for part in _cut(names, first)]
    for _ in range((runs - first) // 2):
        several = [group for group in groups if len(group.names) > 1]
        if not several:
            break
        worst = max(several, key=lambda group: group.noise)
        index = groups.index(worst)
        groups[index : index + 1] = [measure(half) for half in _cut(worst.names, 2)]
    return groups


def _cut(names: Sequence[str], parts: int) -> list[Sequence[str]]:
    """Split names into contiguous parts of nearly equal length."""
    ends = [len(names) * part // parts for part in range(parts + 1)]
    return [names[start:end] for start, end in itertools.pairwise(ends)]


def _replaceable(
    source: pathlib.Path, model: onnx.ModelProto, names: Mapping[str, int]
) -> onnxruntime.InferenceSession:
    """Return a session in which constants can be replaced in every run: they become inputs with a default value."""
    constants = constants_of(model.graph)
    model.graph.input.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, constants[name].dims) for name in names
    )
    path = source.with_name(f'.{source.stem}.replaceable.onnx')
    try:
        save(model, path)
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 3  # ONNX Runtime warns about every such constant
        return onnxruntime.InferenceSession(path, quiet, providers=['CPUExecutionProvider'])
    finally:
        for file in path.parent.glob(f'{path.name}*'):
            file.unlink()


def rounded(weight: np.ndarray, axis: int) -> np.ndarray:
    """Round a weight to 8 bits with one scale per output channel; return it dequantized, in float32."""
    others = tuple(index for index in range(weight.ndim) if index != axis)
    scale = np.abs(weight).max(axis=others, keepdims=True) / _INT8
    scale = np.where(scale == 0, 1, scale)
    return (np.round(weight / scale) * scale).astype(np.float32)
