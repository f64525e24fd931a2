"""Folding of constant factors of an ONNX graph into the weights of the layers whose results they multiply."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import onnx
from onnx import numpy_helper

from export.rewrite.onnx_graph import constants_of, consumers_of, new_constant, producers_of, rename_inputs


def fold_scales(graph: onnx.GraphProto, folder: pathlib.Path) -> None:
    """Move constant factors into the weights of the layers whose results they multiply.

    A factor moves back through reshapes, transposes, and products whose first operand is the layer's result. The
    1/sqrt(K) of attention is thus folded into the query projection, which saves one pass over the queries or the
    larger scores.

    Args:
      folder: location of external weights.
    """
    consumers, constants = consumers_of(graph), constants_of(graph)
    producers = producers_of(graph)
    outputs = {value.name for value in graph.output}
    renamed = {}
    for node in graph.node:
        factor = _scalar_factor(node, constants, folder)
        if factor is None or node.output[0] in outputs:
            continue
        scaled, value = factor
        layer = producers.get(scaled)
        while layer is not None and _passes(layer, constants):
            if len(consumers[layer.output[0]]) != 1 or layer.output[0] in outputs:
                break
            layer = producers.get(layer.input[0])
        if layer is None or layer.op_type not in ('Gemm', 'Conv', 'MatMul') or layer.input[1] not in constants:
            continue
        if len(consumers[layer.output[0]]) == 1 and layer.output[0] not in outputs:
            _scale_layer(graph, layer, value, constants, folder)
            renamed[node.output[0]] = scaled
    rename_inputs(graph, renamed)


def _passes(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Return whether scaling a node's first input by a factor scales its result by the same factor."""
    product = node.op_type == 'MatMul' and node.input[1] not in constants
    return product or node.op_type in ('Reshape', 'Transpose')


def _scalar_factor(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], folder: pathlib.Path
) -> tuple[str, float] | None:
    """Return the value that a node multiplies by a constant scalar, and the scalar; None for any other node."""
    if node.op_type not in ('Mul', 'Div'):
        return None
    scalar = [name in constants and not constants[name].dims for name in node.input]
    if sum(scalar) != 1 or (node.op_type == 'Div' and scalar[0]):
        return None
    number = float(numpy_helper.to_array(constants[node.input[scalar.index(True)]], str(folder)))
    return node.input[scalar.index(False)], number if node.op_type == 'Mul' else 1 / number


def _scale_layer(
    graph: onnx.GraphProto,
    layer: onnx.NodeProto,
    factor: float,
    constants: dict[str, onnx.TensorProto],
    folder: pathlib.Path,
) -> None:
    """Multiply the weights and the bias of a layer by a factor."""
    for position in range(1, len(layer.input)):
        name = layer.input[position]
        array = numpy_helper.to_array(constants[name], str(folder))
        scaled = array * array.dtype.type(factor)
        layer.input[position] = new_constant(graph, constants, f'{name}_times_{factor!r}', scaled)


def fold_query_scales(graph: onnx.GraphProto, folder: pathlib.Path) -> None:
    """Move a constant factor on rotated queries into the gains of the preceding RMS norms.

    Rotation and concatenation are linear, so this is exact. It saves one pass over the queries of every block.

    Args:
      folder: location of external weights.
    """
    constants = constants_of(graph)
    norms = {node.output[0]: node for node in graph.node if node.op_type == 'RMSNormalization'}
    behind: dict[str, set[str]] = {}  # value -> the norms it is linear in
    renamed = {}
    for node in graph.node:
        sources = _norms_behind(node, behind)
        behind |= dict.fromkeys(node.output, sources)
        if sources and node.op_type == 'Mul' and node.input[1] in constants and not constants[node.input[1]].dims:
            renamed[node.output[0]] = node.input[0]
            for name in sources:
                names = (node.input[1], norms[name].input[1])
                factor, gain = (numpy_helper.to_array(constants[i], str(folder)) for i in names)
                graph.initializer.append(numpy_helper.from_array(gain * factor, f'{name}_scaled_gain'))
                norms[name].input[1] = f'{name}_scaled_gain'
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def _norms_behind(node: onnx.NodeProto, behind: Mapping[str, set[str]]) -> set[str]:
    """Return the RMS norms that a node's outputs are linear in; empty if the outputs depend on anything else."""
    if node.op_type == 'RMSNormalization':
        return set(node.output)
    found = [behind.get(name, set()) for name in node.input]
    linear = {
        **dict.fromkeys(('Slice', 'Split', 'Reshape'), bool(found and found[0])),
        **dict.fromkeys(('Add', 'Sub', 'Concat'), all(found)),
        'Mul': sum(map(bool, found)) == 1,
    }
    return set().union(*found) if linear.get(node.op_type) else set()
