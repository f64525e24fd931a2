"""Ranges of activations, measured on recorded inputs, by one of three methods.

`minmax` takes the lowest and the highest value and adds a margin: at 16 bits, clipping values that calibration did not
cover costs far more than the half bit of resolution that the margin takes. `percentile` excludes the outermost values.
`mse` takes the range with the least expected squared error. The last two use histograms, which take a second pass over
the inputs.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import TensorData, TensorsData, save_tensors_data

from export.graphs.table import Feeds
from export.rewrite.onnx_graph import constants_of, shapes_of
from neodragon_jax.base.errors import InputError

METHODS = ('minmax', 'percentile', 'mse')
# The modulation of other prompts often exceeds the calibrated ranges.
MARGIN = 1.5
# Fraction of the values that `percentile` excludes, both ends together.
OUTSIDE = 1e-5
LEVELS = 2**16
BINS = 4096
# Maximum size of the activations held at once for histograms, in bytes.
_AT_ONCE = 1 << 30

Range = tuple[np.ndarray, np.ndarray]
# Called with the number of a calibration input and the graph's outputs for it.
OnOutputs = Callable[[int, Feeds], object]


def measure_ranges(
    source: pathlib.Path,
    destination: pathlib.Path,
    feeds: Callable[[], Iterable[Feeds]],
    operations: Sequence[str],
    method: str = 'minmax',
    margin: float = MARGIN,
    on_outputs: OnOutputs | None = None,
) -> None:
    """Write the range of every activation of a float graph.

    Args:
      feeds: returns the calibration inputs, which are read one by one.
      operations: kinds of nodes whose inputs and outputs are measured.
      method: one of METHODS.
      margin: factor by which `minmax` widens the measured ranges.
      on_outputs: as in `measure_extremes`.
    """
    graph = onnx.load(source, load_external_data=False).graph
    measured = measure_extremes(source, feeds(), operations, on_outputs)
    if method == 'minmax':
        ranges = _widened(measured, graph, margin)
    else:
        choose = {'percentile': _percentile, 'mse': _least_error}[method]
        ranges = {name: choose(*taken) for name, taken in _histograms(source, graph, measured, feeds).items()}
        ranges = measured | ranges
    data: dict[str, Any] = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in ranges.items()
    }
    data |= {name: TensorData(lowest=low, highest=high) for name, (low, high) in _clipped(graph).items()}
    save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), destination)


def measure_extremes(
    source: pathlib.Path, feeds: Iterable[Feeds], operations: Sequence[str], on_outputs: OnOutputs | None = None
) -> dict[str, Range]:
    """Return the lowest and the highest value of every input and output of nodes of the given kinds.

    ONNX Runtime's own calibrator computes the same, but holds the weights twice and all activations until the end of a
    run: 18 GB for the UNet of the first frame.

    Args:
      on_outputs: gets the graph's outputs, so that they are not computed again.
    Raises:
      InputError: there are no calibration inputs.
    """
    model = onnx.load(source, load_external_data=False)
    computed = set(shapes_of(model.graph)) - set(constants_of(model.graph))
    around = (name for node in model.graph.node if node.op_type in operations for name in (*node.input, *node.output))
    names = [name for name in dict.fromkeys(around) if name in computed]
    for index, (name, kind) in enumerate(itertools.product(names, ('ReduceMin', 'ReduceMax'))):
        model.graph.node.append(helper.make_node(kind, [name], [f'extreme_{index}'], keepdims=0))
    outputs = [] if on_outputs is None else [value.name for value in model.graph.output]
    del model.graph.output[len(outputs) :]
    ends = [f'extreme_{index}' for index in range(2 * len(names))]
    model.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, []) for name in ends)
    session, taken = _session(model, source), []
    for number, sample in enumerate(feeds):
        values = session.run([*ends, *outputs], sample)
        taken.append(values[: len(ends)])
        if on_outputs is not None:
            on_outputs(number, dict(zip(outputs, map(np.asarray, values[len(ends) :]), strict=True)))
    if not taken:
        raise InputError(f'{source.name}: no calibration inputs; record at least one.')
    found = np.array(taken, np.float32).reshape(-1, len(names), 2)
    return dict(zip(names, zip(found[..., 0].min(0), found[..., 1].max(0), strict=True), strict=True))


def _session(model: onnx.ModelProto, source: pathlib.Path) -> onnxruntime.InferenceSession:
    """Open a graph that reads its weights from files beside `source`."""
    options = onnxruntime.SessionOptions()
    # Fused operations would hide activations. The priority-based order reduces each activation as soon as it is
    # computed; the default order holds all of them until the end.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    # In the folder of the weights, which the graph refers to by relative paths.
    path = source.with_name(f'.{source.stem}.observed.onnx')
    try:
        onnx.save(model, path)
        return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    finally:
        path.unlink(missing_ok=True)


def _widened(measured: Mapping[str, Range], graph: onnx.GraphProto, margin: float) -> dict[str, Range]:
    """Scale the ranges of all activations except softmax outputs, which are bounded."""
    bounded = {output for node in graph.node if node.op_type == 'Softmax' for output in node.output}
    factors = {name: np.float32(1 if name in bounded else margin) for name in measured}
    return {name: (low * factors[name], high * factors[name]) for name, (low, high) in measured.items()}


def _clipped(graph: onnx.GraphProto) -> dict[str, Range]:
    """Return the exact range of every value that is clipped to constants.

    The quantizer relies on this range to clip.
    """
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if not tensor.dims}
    clips = [node for node in graph.node if node.op_type == 'Clip' and len(node.input) == 3]
    return {
        node.output[0]: (constants[node.input[1]], constants[node.input[2]])
        for node in clips
        if node.input[1] in constants and node.input[2] in constants
    }


def _histograms(
    source: pathlib.Path,
    graph: onnx.GraphProto,
    measured: Mapping[str, Range],
    feeds: Callable[[], Iterable[Feeds]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the histogram (counts, edges) of every activation over its measured range."""
    taken: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for names in _groups(graph, measured):
        model = onnx.load(source, load_external_data=False)
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        session = _session(model, source)
        for sample in feeds():
            for name, array in zip(names, session.run(names, sample), strict=True):
                low, high = (float(end) for end in measured[name])
                counts, edges = np.histogram(np.asarray(array), BINS, (low, max(high, low + 1e-12)))
                taken[name] = (taken[name][0] + counts if name in taken else counts, edges)
    return taken


def _groups(graph: onnx.GraphProto, measured: Mapping[str, Range]) -> Iterator[list[str]]:
    """Yield groups of names of computed activations that fit into memory together."""
    shapes = shapes_of(graph)
    group: list[str] = []
    size = 0
    for name in (output for node in graph.node for output in node.output if output in measured):
        bytes_ = 4 * int(np.prod(shapes[name]))
        if group and size + bytes_ > _AT_ONCE:
            yield group
            group, size = [], 0
        group.append(name)
        size += bytes_
    if group:
        yield group


def _percentile(counts: np.ndarray, edges: np.ndarray) -> Range:
    """Return the range that excludes the fraction OUTSIDE of all values."""
    below = np.cumsum(counts) / max(counts.sum(), 1)
    first = int(np.searchsorted(below, OUTSIDE / 2, side='right'))
    last = int(np.searchsorted(below, 1 - OUTSIDE / 2, side='left'))
    return edges[min(first, len(edges) - 2)], edges[min(last, len(edges) - 2) + 1]


def _least_error(counts: np.ndarray, edges: np.ndarray) -> Range:
    """Return the range of least expected squared error: rounding inside the range, clipping outside."""
    centers, total = (edges[1:] + edges[:-1]) / 2, max(counts.sum(), 1)
    best, least = (edges[0], edges[-1]), np.inf
    for share in np.linspace(1, 0.3, 71):
        low, high = edges[0] * share, edges[-1] * share
        outside = np.maximum(low - centers, 0) + np.maximum(centers - high, 0)
        error = ((high - low) / (LEVELS - 1)) ** 2 / 12 + (counts * outside**2).sum() / total
        if error < least:
            best, least = (low, high), error
    return best
