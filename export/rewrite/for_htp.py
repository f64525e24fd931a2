"""Rewrites that adapt the denoiser's graph to the HTP without changing its function.

Before quantization:
  remove_vector_reshapes  Sums and products read a modulation vector directly, not a reshape of it.
  shrink_transposes       Keys are transposed over three axes; ONNX Runtime would move a transpose over four.
After quantization:
  fuse_gains              The gain of an adaptive layer norm becomes the norm's own gain, in 16 bits. This saves a pass.
  convert_before_cutting  Keys and values are converted to the type of a second operand once, not once for every prefix
                          that is sliced from them.

In a quantized graph every value has three steps: the float result of an operation, QuantizeLinear, and
DequantizeLinear, which the next operation reads. A conversion is a second QuantizeLinear/DequantizeLinear pair.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.rewrite.onnx_graph import (
    attribute,
    constants_of,
    consumers_of,
    drop_unused,
    producers_of,
    rename_inputs,
    replace_nodes,
    shapes_of,
    sort_nodes,
)

_LAYOUT_PERMUTATIONS = ([0, 2, 3, 1], [0, 3, 1, 2])


def remove_vector_reshapes(graph: onnx.GraphProto) -> None:
    """Connect sums and products to inputs of rank 1 directly: broadcasting makes a reshape to more axes unnecessary."""
    vectors = {value.name for value in graph.input if len(value.type.tensor_type.shape.dim) == 1}
    consumers = consumers_of(graph)
    renamed = {}
    for node in graph.node:
        reads_vector = node.op_type == 'Reshape' and node.input[0] in vectors
        if reads_vector and all(reader.op_type in ('Add', 'Mul') for reader in consumers[node.output[0]]):
            renamed[node.output[0]] = node.input[0]
    rename_inputs(graph, renamed)
    drop_unused(graph)


def shrink_transposes(graph: onnx.GraphProto) -> None:
    """Drop the leading axis of size 1 from transposes that look like a change of picture layout.

    ONNX Runtime moves such a transpose past all of its readers. A transpose of keys would move past the slices of
    all prefixes, and one transpose would become three.
    """
    shapes = shapes_of(graph)
    nodes = []
    for node in graph.node:
        perm, shape = list(attribute(node, 'perm', ())), shapes.get(node.input[0], []) if node.input else []
        if node.op_type != 'Transpose' or perm not in _LAYOUT_PERMUTATIONS or shape[:1] != [1]:
            nodes.append(node)
            continue
        inner = [axis - 1 for axis in perm[1:]]
        steps = [f'{node.name}_{step}' for step in ('flat', 'turned')]
        for name, dims in ((steps[0], shape[1:]), (steps[1], [shape[axis] for axis in perm])):
            graph.initializer.append(numpy_helper.from_array(np.array(dims, np.int64), f'{name}_shape'))
        nodes += [
            helper.make_node('Reshape', [node.input[0], f'{steps[0]}_shape'], steps[:1], name=steps[0]),
            helper.make_node('Transpose', steps[:1], steps[1:], name=steps[1], perm=inner),
            helper.make_node('Reshape', [steps[1], f'{steps[1]}_shape'], list(node.output), name=node.name),
        ]
    replace_nodes(graph, nodes)


def fuse_gains(graph: onnx.GraphProto) -> None:
    """Fuse the vector that multiplies a plain layer norm's result into the norm as its gain, in a quantized graph.

    The HTP's layer norm accepts a computed (not stored) gain only in symmetric 16 bits.
    """
    constants, consumers = constants_of(graph), consumers_of(graph)
    producers = producers_of(graph)
    vectors = {value.name for value in graph.input if len(value.type.tensor_type.shape.dim) == 1}
    values = lambda names: [numpy_helper.to_array(constants[name]) for name in names]
    fused, added = set(), []
    for norm in graph.node:
        if norm.op_type != 'LayerNormalization' or producers[norm.input[1]].input[0] not in constants:
            continue
        weight, step, offset = values(producers[norm.input[1]].input)
        product, result, between = _reader(consumers, norm), norm.output[0], []
        while product is not None and product.op_type in ('QuantizeLinear', 'DequantizeLinear'):
            between.append(product.name)
            product, result = _reader(consumers, product), product.output[0]
        if (
            product is None
            or product.op_type != 'Mul'
            or not np.allclose((weight - float(offset)) * step, 1, atol=1e-3)
        ):
            continue
        (dequantized,) = set(product.input) - {result}
        gain = producers[producers[dequantized].input[0]]
        if gain.input[0] not in vectors:
            continue
        scale, zero = values(producers[dequantized].input[1:3])
        names = _new_constants(graph, gain.input[0], scale, zero, np.int16)
        pair, name = _quantization(gain.input[0], f'{gain.input[0]}_16', names)
        added += pair
        norm.input[:] = [norm.input[0], name]
        norm.output[0] = product.output[0]
        fused |= {product.name, *between}
    replace_nodes(graph, [*added, *(node for node in graph.node if node.name not in fused)])
    drop_unused(graph)


def _reader(consumers: Mapping[str, list[onnx.NodeProto]], node: onnx.NodeProto) -> onnx.NodeProto | None:
    """Return the only reader of a node's result, or None if there is not exactly one."""
    readers = consumers[node.output[0]]
    return readers[0] if len(readers) == 1 else None


def convert_before_cutting(graph: onnx.GraphProto) -> None:
    """Convert second operands of matrix products before they are sliced.

    Otherwise each slice would be converted separately, with its own range.
    """
    walk = _Conversions(graph)
    for product in [node for node in graph.node if node.op_type == 'MatMul']:
        converted = walk.operand(product.input[1])
        if converted:
            product.input[1] = converted
    graph.node.extend(walk.nodes)
    sort_nodes(graph)
    drop_unused(graph)


class _Conversions:
    """Converted twins of quantized values, created on demand; `nodes` holds the new nodes."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._graph = graph
        self._constants = constants_of(graph)
        self._producers = producers_of(graph)
        self._cut = {self._source(node.input[0]) for node in graph.node if node.op_type == 'Slice'}
        self._converted: dict[str, tuple[str, list[str]]] = {}

    def operand(self, name: str) -> str | None:
        """Return the twin of a converted second operand, or None if no slice is involved."""
        before = self._before_conversion(name)
        if before is None:
            return None
        pair = self._pair(name)
        assert pair is not None
        self._kind = numpy_helper.to_array(self._constants[pair[1].input[2]]).dtype.type
        value = self._source(before)
        node = self._producers.get(value)
        if node is not None and node.op_type == 'Slice' and self._is_quantized(node.input[0]):
            whole, parameters = self._twin(self._source(node.input[0]), node.input[0])
            return self._slice(node, whole, parameters)
        return self._twin(value, before)[0] if value in self._cut else None

    def _before_conversion(self, name: str) -> str | None:
        """Return the dequantized value that a conversion reads, if `name` is a conversion's result."""
        pair = self._pair(name)
        return pair[0].input[0] if pair and self._is_quantized(pair[0].input[0]) else None

    def _pair(self, name: str) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
        """Return the QuantizeLinear and DequantizeLinear that produce a value, or None."""
        last = self._producers.get(name)
        if last is None or last.op_type != 'DequantizeLinear':
            return None
        first = self._producers.get(last.input[0])
        return (first, last) if first is not None and first.op_type == 'QuantizeLinear' else None

    def _is_quantized(self, name: str) -> bool:
        return self._pair(name) is not None

    def _source(self, name: str) -> str:
        """Return the float value before all quantization."""
        while pair := self._pair(name):
            name = pair[0].input[0]
        return name

    def _twin(self, value: str, dequantized: str) -> tuple[str, list[str]]:
        """Return the converted twin of a value quantized as `dequantized`, and the names of its parameters."""
        if value not in self._converted:
            pair = self._pair(dequantized)
            assert pair is not None
            scale, zero = (numpy_helper.to_array(self._constants[name]) for name in pair[1].input[1:3])
            parameters = _new_constants(self._graph, f'{value}_converted', scale, zero, self._kind)
            self._converted[value] = self._quantized(dequantized, f'{value}_converted', parameters), parameters
        return self._converted[value]

    def _slice(self, node: onnx.NodeProto, whole: str, parameters: list[str]) -> str:
        """Return the slice of a converted value, in the same quantization."""
        result = f'{node.output[0]}_of_converted'
        if result not in self._converted:
            cut = onnx.NodeProto.FromString(node.SerializeToString())
            cut.input[0], cut.output[0], cut.name = whole, result, f'{node.name}_of_converted'
            self.nodes.append(cut)
            self._converted[result] = self._quantized(result, result, parameters), parameters
        return self._converted[result][0]

    def _quantized(self, value: str, name: str, parameters: list[str]) -> str:
        """Return a value after a new QuantizeLinear and DequantizeLinear."""
        nodes, result = _quantization(value, name, parameters)
        self.nodes += nodes
        return result


def _quantization(value: str, name: str, parameters: list[str]) -> tuple[list[onnx.NodeProto], str]:
    """Return a QuantizeLinear and a DequantizeLinear, and the name of their result."""
    steps = [value, f'{name}_quantized', f'{name}_dequantized']
    return [
        helper.make_node(kind, [source, *parameters], [result], name=f'{result}_node')
        for kind, source, result in zip(('QuantizeLinear', 'DequantizeLinear'), steps, steps[1:], strict=False)
    ], steps[-1]


def _new_constants(
    graph: onnx.GraphProto, name: str, scale: np.ndarray, zero: np.ndarray, kind: type[np.signedinteger]
) -> list[str]:
    """Add symmetric quantization parameters that span the range of `scale` and `zero`; return their names."""
    limits = np.iinfo(zero.dtype)
    steps = max(int(limits.max) - int(zero), int(zero) - int(limits.min))
    symmetric = np.asarray(scale * np.float32(steps / np.iinfo(kind).max), np.float32)
    bits = np.iinfo(kind).bits
    names = [f'{name}_scale_{bits}', f'{name}_zero_point_{bits}']
    for key, value in zip(names, (symmetric, kind(0)), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), key))
    return names
