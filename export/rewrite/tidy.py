"""Rewrites that adapt an exported ONNX graph to the phone without changing its function.

JAX uses channels-last pictures, ONNX channels-first, and the HTP channels-last again. A graph exported from JAX
therefore has a transpose on either side of every convolution. It also expresses some single HTP operations as several
primitive ones. Each function here rewrites one such pattern, in place; `tidy` runs all those that are always valid.

Legend: B pictures, H W grid, C channels, s upscaling factor.
"""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import onnx.reference
from onnx import helper, numpy_helper

from export.rewrite.channels_first import channels_first
from export.rewrite.fold_scales import fold_query_scales, fold_scales
from export.rewrite.joins import join_at_rank_three
from export.rewrite.onnx_graph import (
    attribute,
    constants_of,
    consumers_of,
    drop_identities,
    drop_unused,
    new_constant,
    producers_of,
    rename_inputs,
    replace_nodes,
    shapes_of,
    share_weights,
)

# Operations on shapes: they are removed once their results are constants.
_SHAPE_ARITHMETIC = frozenset({'Concat', 'Cast', 'Unsqueeze', 'Squeeze', 'Slice', 'Identity', 'Gather'})
_BROADCASTING = frozenset({'Add', 'Sub', 'Mul', 'Div', 'Max', 'Min'})
# Permutations to B H s W s C, for channels ordered (C, row, column) and (row, column, C).
_TO_PIXELS = {(0, 1, 4, 2, 5, 3): 'CRD', (0, 1, 3, 2, 4, 5): 'DCR'}


def tidy(graph: onnx.GraphProto, folder: pathlib.Path) -> None:
    """Apply every rewrite that is valid for all graphs; `folder` holds external weights."""
    fold_shape_arithmetic(graph)
    broadcast_implicitly(graph)
    explicit_padding(graph)
    plain_resize(graph)
    depth_to_space(graph)
    replace_by_reshapes(graph)
    channels_first(graph)
    join_at_rank_three(graph)
    merge_transposes(graph)
    merge_reshapes(graph)
    drop_unused(graph)  # an unused reader would hide that a value has only one used reader
    fold_scales(graph, folder)
    fold_query_scales(graph, folder)
    share_weights(graph, folder)
    drop_unused(graph)


def fold_shape_arithmetic(graph: onnx.GraphProto) -> None:
    """Evaluate shape operations on integer constants and replace them by their results."""
    values = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.INT64
    }
    kept = []
    for node in graph.node:
        known = node.op_type in _SHAPE_ARITHMETIC and all(name in values for name in node.input if name)
        if not known or not node.input:
            kept.append(node)
            continue
        feeds = {name: values[name] for name in node.input if name}
        (result,) = onnx.reference.ReferenceEvaluator(node).run(None, feeds)
        values[node.output[0]] = np.asarray(result)
        graph.initializer.append(numpy_helper.from_array(np.asarray(result), node.output[0]))
    replace_nodes(graph, kept)


def broadcast_implicitly(graph: onnx.GraphProto) -> None:
    """Remove every Expand that has no effect or whose readers broadcast implicitly."""
    consumers, outputs = consumers_of(graph), {value.name for value in graph.output}
    shapes = shapes_of(graph)
    renamed = {}
    for node in graph.node:
        if node.op_type != 'Expand' or node.output[0] in outputs:
            continue
        result = shapes[node.output[0]]
        readers = consumers[node.output[0]]
        # A reader's result keeps its shape only if another operand has that shape.
        if shapes[node.input[0]] == result or all(
            reader.op_type in _BROADCASTING
            and any(name != node.output[0] and shapes.get(name) == shapes[reader.output[0]] for name in reader.input)
            and len(result) <= len(shapes[reader.output[0]])
            for reader in readers
        ):
            renamed[node.output[0]] = node.input[0]
    rename_inputs(graph, renamed)


def explicit_padding(graph: onnx.GraphProto) -> None:
    """Replace `auto_pad` by explicit padding in convolutions of stride 1 with odd kernels."""
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != 'Conv' or attribute(node, 'auto_pad', b'NOTSET') == b'NOTSET':
            continue
        kernel = shapes[node.input[1]][2:]
        strided = any(stride != 1 for stride in attribute(node, 'strides', [1, 1]))
        if attribute(node, 'auto_pad') not in (b'SAME_UPPER', b'VALID') or strided or any(k % 2 == 0 for k in kernel):
            continue  # the check of allowed operations rejects it later
        same = attribute(node, 'auto_pad') == b'SAME_UPPER'
        pads = [k // 2 * same for k in kernel] * 2
        kept = [entry for entry in node.attribute if entry.name not in ('auto_pad', 'pads')]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute('pads', pads)])


def plain_resize(graph: onnx.GraphProto) -> None:
    """Write nearest-neighbor upscaling by integer factors in the only form that the HTP accepts: asymmetric, floor.

    All coordinate conventions of ONNX agree for integer factors.
    """
    constants, shapes = constants_of(graph), shapes_of(graph)
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != 'Resize' or attribute(node, 'mode', b'nearest') != b'nearest':
            continue
        before, after = shapes[node.input[0]], shapes[node.output[0]]
        if len(before) != 4 or any(new % old for new, old in zip(after, before, strict=True)):
            continue
        sizes = new_constant(graph, constants, f'{node.output[0]}_sizes', np.array(after, np.int64))
        nodes[-1] = helper.make_node(
            'Resize',
            [node.input[0], '', '', sizes],
            node.output,
            name=node.name,
            mode='nearest',
            coordinate_transformation_mode='asymmetric',
            nearest_mode='floor',
        )
    replace_nodes(graph, nodes)


def depth_to_space(graph: onnx.GraphProto) -> None:
    """Replace reshape, transpose, reshape of channels-last pictures by DepthToSpace where they are equivalent."""
    shapes, consumers = shapes_of(graph), consumers_of(graph)
    producers = producers_of(graph)
    nodes = []
    for node in graph.node:
        nodes.append(node)
        turn = producers.get(node.input[0]) if node.op_type == 'Reshape' else None
        if turn is None or turn.op_type != 'Transpose' or len(consumers[turn.output[0]]) != 1:
            continue
        split, mode = producers.get(turn.input[0]), _TO_PIXELS.get(tuple(attribute(turn, 'perm', ())))
        if split is None or split.op_type != 'Reshape' or mode is None or len(consumers[split.output[0]]) != 1:
            continue
        before, apart, after = shapes[split.input[0]], shapes[split.output[0]], shapes[node.output[0]]
        factor = apart[4]
        grid = [before[0], before[1] * factor, before[2] * factor, before[3] // factor**2] if len(before) == 4 else []
        if apart[:3] != before[:3] or after != grid or apart[{'CRD': 5, 'DCR': 3}[mode]] != factor:
            continue
        name = node.output[0]
        nodes[-1:] = [
            helper.make_node('Transpose', [split.input[0]], [f'{name}_depth'], name=f'{name}_depth', perm=[0, 3, 1, 2]),
            helper.make_node(
                'DepthToSpace', [f'{name}_depth'], [f'{name}_space'], name=node.name, blocksize=factor, mode=mode
            ),
            helper.make_node('Transpose', [f'{name}_space'], [name], name=f'{name}_space', perm=[0, 2, 3, 1]),
        ]
    replace_nodes(graph, nodes)
    drop_unused(graph)


def replace_by_reshapes(graph: onnx.GraphProto) -> None:
    """Replace Squeeze, Unsqueeze and Flatten by Reshape; remove Identity and Dropout."""
    shapes, constants = shapes_of(graph), constants_of(graph)
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == 'Dropout':  # an identity at inference
            nodes[-1] = helper.make_node('Identity', node.input[:1], node.output[:1], name=node.name)
        if node.op_type in ('Squeeze', 'Unsqueeze', 'Flatten') and node.output[0] in shapes:
            shape = np.array(shapes[node.output[0]], np.int64)
            name = new_constant(graph, constants, f'{node.output[0]}_shape', shape)
            nodes[-1] = helper.make_node('Reshape', [node.input[0], name], node.output, name=node.name)
    replace_nodes(graph, nodes)
    drop_identities(graph)


def merge_reshapes(graph: onnx.GraphProto) -> None:
    """Merge consecutive Reshapes; remove those that do not change the shape."""
    shapes, outputs = shapes_of(graph), {value.name for value in graph.output}
    source = {node.output[0]: node.input[0] for node in graph.node if node.op_type == 'Reshape'}
    renamed = {}
    for node in graph.node:
        while node.op_type == 'Reshape' and node.input[0] in source:
            node.input[0] = source[node.input[0]]
        if node.op_type == 'Reshape' and node.output[0] not in outputs:
            same = shapes.get(node.input[0]) == shapes[node.output[0]]
            renamed |= {node.output[0]: node.input[0]} if same else {}
    rename_inputs(graph, renamed)


def merge_transposes(graph: onnx.GraphProto) -> None:
    """Merge consecutive Transposes; remove those whose permutation is the identity."""
    turns = {node.output[0]: node for node in graph.node if node.op_type == 'Transpose'}
    outputs = {value.name for value in graph.output}
    renamed = {}
    for node in graph.node:
        if node.op_type != 'Transpose':
            continue
        perm = list(attribute(node, 'perm'))
        while node.input[0] in turns:
            before = turns[node.input[0]]
            perm = [attribute(before, 'perm')[axis] for axis in perm]
            node.input[0] = before.input[0]
        del node.attribute[:]
        node.attribute.append(helper.make_attribute('perm', perm))
        if perm == sorted(perm) and node.output[0] not in outputs:
            renamed[node.output[0]] = node.input[0]
    rename_inputs(graph, renamed)


def clamp_gelu(graph: onnx.GraphProto, floor: float) -> None:
    """Clamp the inputs of every GELU at `floor`, below which it is zero in float32 and inexact in narrower types."""
    constants = constants_of(graph)
    nodes = []
    for node in graph.node:
        if node.op_type == 'Gelu':
            least = new_constant(graph, constants, 'gelu_floor', np.float32(floor))
            clamped = f'{node.input[0]}_above_floor'
            nodes.append(helper.make_node('Max', [node.input[0], least], [clamped], name=f'{node.name}_floor'))
            node.input[0] = clamped
        nodes.append(node)
    replace_nodes(graph, nodes)
