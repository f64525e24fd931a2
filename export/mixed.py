"""Which layers of a W8A16 graph take their weights in two parts: as few as the target needs.

Rounding weights to 8 bits makes most of the error. A layer can run twice instead, with what 8 bits hold of its weights
and with what rounding left over, in 8 bits again; the sum has almost 16. Real 16-bit weights are no substitute: on the
HTP simulator, convolutions with them came out 20 to 40 dB worse than they should.

Every layer's share of the error is measured on the float graph, by rounding that layer's weights alone; layers are then
doubled in the order of error per byte until what remains fits the target.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from export.adaround import Rounding
from export.graphs import Feeds
from export.quantize import quantise, quantised_operations
from export.ranges import measure_ranges
from export.report import snr_db
from export.rewrites import constants_of, drop_unused, new_constant, replace_nodes, write_shapes
from export.runtime import Call, GraphRunner, OnnxSession
from export.to_onnx import save

# The search aims this much above the target, because other inputs than those it sees come out worse.
HEADROOM_DB = 3.0
_INT8 = 127
# Which axis of its weight is a layer's output channel.
_AXES = {'Conv': 0, 'Gemm': 1}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight of one or more layers, and what its rounding does.

    Attributes:
      name: of the constant.
      size: number of values, so bytes at 8 bits, and bytes that a second part costs.
      noise: squared error of the judged outputs when this weight alone is rounded.
    """

    name: str
    size: int
    noise: float


def quantise_to_target(
    source: pathlib.Path,
    destination: pathlib.Path,
    ranges: pathlib.Path,
    calls: Sequence[Call],
    judged: Sequence[str],
    target_db: float,
    on_weight: Callable[[int, int], object] = lambda done, total: None,
    rounding: Rounding | None = None,
) -> tuple[list[str], float]:
    """Write the W8A16 form of a float graph, with as many weights in two parts as it needs.

    Args:
      ranges: of the activations.
      calls: calibration calls with their float outputs, to judge by; the first one finds the layers' shares.
      judged: names of the outputs that count.
      on_weight: called with (done, total) while the shares are measured.
      rounding: of the weights that stay in one part; None rounds to the nearest.
    Returns:
      The weights in two parts, and the ratio on `calls` in dB. It is below the target if nothing reaches that.
    """
    aim = target_db + HEADROOM_DB
    quantise(source, destination, ranges, rounding)
    reached = lowest_db(OnnxSession(destination), calls, judged)
    best: tuple[float, list[str]] = (reached, [])
    if reached >= aim:
        return [], reached
    weights = sorted(
        rounding_noise(source, calls[0], judged, on_weight, rounding), key=lambda weight: -weight.noise / weight.size
    )
    remaining = np.cumsum([0.0, *(weight.noise for weight in reversed(weights))])[::-1]
    signal = float(np.square(joined(calls[0].outputs, judged), dtype=np.float64).sum())
    count, allowed_db, doubled = 0, aim, []
    while count < len(weights):
        count = max(count + 1, int(np.argmax(remaining <= signal / 10 ** (allowed_db / 10))))
        doubled = [weight.name for weight in weights[:count]]
        reached = _quantise_doubled(source, destination, ranges, calls, judged, doubled, rounding)
        best = max(best, (reached, doubled))
        if reached >= aim:
            return doubled, reached
        allowed_db += max(3.0, aim - reached)
    if best[1] != doubled:
        _quantise_doubled(source, destination, ranges, calls, judged, best[1], rounding)
    return best[1], best[0]


def _quantise_doubled(
    source: pathlib.Path,
    destination: pathlib.Path,
    ranges: pathlib.Path,
    calls: Sequence[Call],
    judged: Sequence[str],
    doubled: Collection[str],
    rounding: Rounding | None,
) -> float:
    """Write the W8A16 form with some weights in two parts; return the ratio on `calls`."""
    path = source.with_name(f'.{source.stem}.doubled.onnx')
    try:
        model = onnx.load(source, load_external_data=False)
        double_weights(model.graph, doubled, source.parent)
        save(model, path)
        extended = destination.with_name('ranges-doubled.json')
        # The parts' own results are new; a few calls are enough, since a clipped second part costs little.
        measure_ranges(path, extended, lambda: (call.inputs for call in calls), quantised_operations(path))
        _merge_ranges(extended, ranges)
        quantise(path, destination, extended, rounding)
    finally:
        for file in path.parent.glob(f'{path.name}*'):
            file.unlink()
    return lowest_db(OnnxSession(destination), calls, judged)


def double_weights(graph: onnx.GraphProto, names: Collection[str], folder: pathlib.Path) -> None:
    """Let layers run twice, with what 8 bits hold of their weights and with the rest, and add the results.

    Args:
      names: of the weights.
      folder: where weights that are not in the graph itself lie.
    """
    constants, nodes = constants_of(graph), []
    for node in graph.node:
        if node.op_type not in _AXES or node.input[1] not in names:
            nodes.append(node)
            continue
        weight, result = node.input[1], node.output[0]
        array = numpy_helper.to_array(constants[weight], str(folder))
        coarse = rounded(array, _AXES[node.op_type])
        parts = [onnx.NodeProto.FromString(node.SerializeToString()) for _ in range(2)]
        for part, kind, values in zip(parts, ('coarse', 'fine'), (coarse, array - coarse), strict=True):
            part.name, part.output[0] = f'{node.name}_{kind}', f'{result}_{kind}'
            part.input[1] = new_constant(graph, constants, f'{weight}_{kind}', values)
        del parts[1].input[2:]  # the bias is in the first part
        total = helper.make_node('Add', [part.output[0] for part in parts], [result], name=f'{node.name}_sum')
        nodes += [*parts, total]
    replace_nodes(graph, nodes)
    drop_unused(graph)
    write_shapes(graph)


def _merge_ranges(path: pathlib.Path, known: pathlib.Path) -> None:
    """Replace the ranges in a file by those of another one, for all activations that it has."""
    ranges, better = (json.loads(file.read_text()) for file in (path, known))
    ranges['data'] |= better['data']
    path.write_text(json.dumps(ranges))


def rounding_noise(
    source: pathlib.Path,
    call: Call,
    judged: Sequence[str],
    on_weight: Callable[[int, int], object] = lambda done, total: None,
    rounding: Rounding | None = None,
) -> list[Weight]:
    """Return every weight of a float graph with the error that its rounding to 8 bits makes."""
    model = onnx.load(source, load_external_data=False)
    constants = constants_of(model.graph)
    axes = {
        node.input[1]: _AXES[node.op_type]
        for node in model.graph.node
        if node.op_type in _AXES and node.input[1] in constants
    }
    session = _replaceable(source, model, axes)

    def run(feeds: Feeds) -> np.ndarray:
        outputs = (np.asarray(array) for array in session.run(list(judged), feeds))
        return joined(dict(zip(judged, outputs, strict=True)), judged).astype(np.float64)

    exact = run(call.inputs)
    weights = []
    for index, (name, axis) in enumerate(axes.items()):
        array = numpy_helper.to_array(constants[name], str(source.parent))
        stored = rounding.value(name) if rounding is not None and name in rounding.levels else rounded(array, axis)
        got = run({**call.inputs, name: stored})
        weights.append(Weight(name, array.size, float(np.square(got - exact).sum())))
        on_weight(index + 1, len(axes))
    return weights


def _replaceable(
    source: pathlib.Path, model: onnx.ModelProto, names: Mapping[str, int]
) -> onnxruntime.InferenceSession:
    """Return a session in which constants can be replaced from run to run: they are inputs with a default value."""
    constants = constants_of(model.graph)
    model.graph.input.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, constants[name].dims) for name in names
    )
    path = source.with_name(f'.{source.stem}.replaceable.onnx')
    try:
        save(model, path)
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 3  # it warns of every such constant
        return onnxruntime.InferenceSession(path, quiet, providers=['CPUExecutionProvider'])
    finally:
        for file in path.parent.glob(f'{path.name}*'):
            file.unlink()


def rounded(weight: np.ndarray, axis: int) -> np.ndarray:
    """Return a weight as 8 bits with one scale per output channel hold it."""
    others = tuple(index for index in range(weight.ndim) if index != axis)
    scale = np.abs(weight).max(axis=others, keepdims=True) / _INT8
    scale = np.where(scale == 0, 1, scale)
    return (np.round(weight / scale) * scale).astype(np.float32)


def lowest_db(runner: GraphRunner, calls: Sequence[Call], judged: Sequence[str]) -> float:
    """Return the lowest ratio over recorded calls, of all judged outputs together."""
    return min(snr_db(joined(call.outputs, judged), joined(runner.run(call.inputs), judged)) for call in calls)


def joined(outputs: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Return some of a graph's outputs as one vector."""
    return np.concatenate([np.ravel(outputs[name]) for name in names])
