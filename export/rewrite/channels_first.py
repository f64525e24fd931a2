"""Propagation of the channels-first layout through an ONNX graph.

ONNX convolves channels-first pictures [B, C, H, W]. A graph from JAX is channels-last [B, H, W, C] between its
convolutions, with a transpose before and after each of them. This rewrite extends the channels-first layout over
elementwise operations, concatenations, splits and resizes. Transposes remain only at graph inputs, at graph outputs,
and where pixels are treated as tokens. QNN then converts the whole graph, convolutions included, to the channels-last
layout of the HTP, which removes the remaining transposes as well.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.rewrite.onnx_graph import attribute, constants_of, replace_nodes, shapes_of

TO_FIRST, TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]
# Axis of a channels-last picture -> the same axis in channels-first order.
_AXIS = {0: 0, 1: 2, 2: 3, 3: 1}
_ELEMENTWISE = frozenset(
    {'Add', 'Sub', 'Mul', 'Div', 'Max', 'Min', 'Relu', 'Clip', 'Sigmoid', 'Tanh', 'Gelu', 'Neg', 'Abs', 'Exp'}
)
_ALONG_AN_AXIS = frozenset({'Concat', 'Split'})


def channels_first(graph: onnx.GraphProto) -> None:
    """Propagate the channels-first layout through a graph, in place."""
    layout_pass = _LayoutPass(graph)
    for node in graph.node:
        layout_pass.visit(node)
    for value in graph.output:
        layout_pass.last(value.name)
    replace_nodes(graph, layout_pass.nodes)


class _LayoutPass:
    """One pass over the nodes in order; `nodes` holds the new graph so far."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._graph = graph
        self._shapes, self._constants = shapes_of(graph), constants_of(graph)
        self._twins: dict[str, str] = {}  # channels-last value -> the same picture channels-first
        self._missing: set[str] = set()  # channels-last values that exist only as their twin
        self._renamed: dict[str, str] = {}

    def visit(self, node: onnx.NodeProto) -> None:
        """Add a node, in channels-first order if it supports that and one of its inputs already has that order."""
        node.input[:] = [self._renamed.get(name, name) for name in node.input]
        perm = list(attribute(node, 'perm', ())) if node.op_type == 'Transpose' else []
        if perm == TO_FIRST:
            self._renamed[node.output[0]] = self.first(node.input[0])
        elif perm == TO_LAST:
            self._add_twin(node.output[0], node.input[0])
        elif self._can_follow(node):
            self._follow(node)
        else:
            for name in node.input:
                self.last(name)
            self.nodes.append(node)

    def first(self, name: str) -> str:
        """Return the name of a picture in channels-first order; create it if necessary."""
        if name in self._constants:
            return self._constant_first(name)
        if name not in self._twins:
            twin, shape = f'{name}_first', self._shapes[name]
            if sum(size != 1 for size in shape) > 1:
                node = helper.make_node('Transpose', [name], [twin], name=twin, perm=TO_FIRST)
            else:  # at most one axis is larger than 1: a reshape suffices
                wanted = np.array([shape[axis] for axis in TO_FIRST], np.int64)
                self._graph.initializer.append(numpy_helper.from_array(wanted, f'{twin}_shape'))
                node = helper.make_node('Reshape', [name, f'{twin}_shape'], [twin], name=twin)
            self.nodes.append(node)
            self._twins[name] = twin
        return self._twins[name]

    def last(self, name: str) -> None:
        """Create the channels-last value if only its twin exists."""
        if name in self._missing:
            turn = helper.make_node('Transpose', [self._twins[name]], [name], name=f'{name}_last', perm=TO_LAST)
            self.nodes.append(turn)
            self._missing.remove(name)

    def _add_twin(self, name: str, twin: str) -> None:
        self._twins[name] = twin
        self._missing.add(name)

    def _can_follow(self, node: onnx.NodeProto) -> bool:
        """Return whether a node can run in channels-first order and one of its input pictures has a twin."""
        known = node.op_type in _ELEMENTWISE or node.op_type in _ALONG_AN_AXIS or node.op_type == 'Resize'
        pictures = node.input[:1] if node.op_type in ('Resize', 'Split', 'Clip') else node.input
        if not known or not any(name in self._twins for name in pictures):
            return False
        return all(name in self._constants or len(self._shapes.get(name, ())) == 4 for name in pictures)

    def _follow(self, node: onnx.NodeProto) -> None:
        """Add the channels-first form of a node."""
        count = 1 if node.op_type in ('Resize', 'Split', 'Clip') else len(node.input)
        inputs = [*map(self.first, node.input[:count]), *node.input[count:]]
        if node.op_type == 'Resize':
            sizes = np.array([self._shapes[node.output[0]][axis] for axis in TO_FIRST], np.int64)
            self._graph.initializer.append(numpy_helper.from_array(sizes, f'{node.output[0]}_first_sizes'))
            inputs = [inputs[0], '', '', f'{node.output[0]}_first_sizes']
        outputs = [f'{name}_first' for name in node.output]
        turned = onnx.NodeProto.FromString(node.SerializeToString())
        turned.input[:], turned.output[:] = inputs, outputs
        for entry in turned.attribute:
            if entry.name == 'axis' and node.op_type in _ALONG_AN_AXIS:
                entry.i = _AXIS[entry.i % 4]
        self.nodes.append(turned)
        for name, twin in zip(node.output, outputs, strict=True):
            self._add_twin(name, twin)

    def _constant_first(self, name: str) -> str:
        """Return the name of a constant that broadcasts against channels-first pictures."""
        tensor = self._constants[name]
        if len(tensor.dims) == 0:
            return name
        turned = f'{name}_first'
        if turned not in self._constants:
            array = numpy_helper.to_array(tensor)
            array = array.reshape((1,) * (4 - array.ndim) + array.shape).transpose(TO_FIRST)
            self._constants[turned] = numpy_helper.from_array(np.ascontiguousarray(array), turned)
            self._graph.initializer.append(self._constants[turned])
        return turned
