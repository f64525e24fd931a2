"""Look-ups and small edits of an ONNX graph that all rewrites share."""

from __future__ import annotations

import collections
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from onnx_ir.passes import common as passes

# Opset that jax2onnx writes.
OPSET = 23
# Constants of at most this many values are kept for shape inference.
_SMALL = 8


def constants_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Return the constants of a graph by name."""
    return {tensor.name: tensor for tensor in graph.initializer}


def external_files(graph: onnx.GraphProto) -> list[str]:
    """Return the names of the files that hold weights of a graph, relative to the folder of its own file."""
    names = {
        entry.value
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == 'location'
    }
    return sorted(names)


def shapes_of(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """Infer the static shape of every value from the inputs; the shapes that the exporter stored may be outdated."""
    bare = onnx.GraphProto(name=graph.name, input=graph.input, output=graph.output)
    for node in graph.node:
        # ONNX has no shape inference for GroupNormalization; its output has the shape of its input.
        same = node.op_type == 'GroupNormalization'
        bare.node.append(helper.make_node('Identity', node.input[:1], node.output) if same else node)
    for tensor in graph.initializer:  # without the weights: copies of them would take gigabytes
        if tensor.data_type == onnx.TensorProto.INT64 or math.prod(tensor.dims) <= _SMALL:
            bare.initializer.append(tensor)
        else:
            bare.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model = ir.serde.deserialize_model(helper.make_model(bare, opset_imports=[helper.make_opsetid('', OPSET)]))
    passes.ShapeInferencePass(strict_mode=False)(model)
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [value for node in model.graph for value in node.outputs]
    return {value.name: list(value.shape.numpy()) for value in values if value.name and value.shape is not None}


def write_shapes(graph: onnx.GraphProto) -> None:
    """Write the shape of every value between inputs and outputs into the graph."""
    ends = {value.name for value in (*graph.input, *graph.output)} | set(constants_of(graph))
    made = {name for node in graph.node for name in node.output}
    shapes = {name: shape for name, shape in shapes_of(graph).items() if name in made - ends}
    del graph.value_info[:]
    graph.value_info.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()
    )


def producers_of(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Return the node that produces each value, by the value's name."""
    return {name: node for node in graph.node for name in node.output}


def consumers_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Return the nodes that read each value; a node that reads it twice counts twice."""
    consumers: dict[str, list[onnx.NodeProto]] = collections.defaultdict(list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)
    return consumers


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Replace the nodes of a graph; the new nodes may include existing ones."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of a node's attribute, or `default` if the node does not have it."""
    for entry in node.attribute:
        if entry.name == name:
            return helper.get_attribute_value(entry)
    return default


def rename_inputs(graph: onnx.GraphProto, renamed: Mapping[str, str]) -> None:
    """Rename node inputs; chains of renames are followed to the end."""

    def final(name: str) -> str:
        while name in renamed:
            name = renamed[name]
        return name

    for node in graph.node:
        node.input[:] = [final(name) for name in node.input]


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and constants that no output depends on."""
    _apply(graph, passes.RemoveUnusedNodesPass())


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Sort the nodes topologically; otherwise keep their order."""
    _apply(graph, passes.TopologicalSortPass())


def drop_identities(graph: onnx.GraphProto) -> None:
    """Connect the readers of an Identity to its input, and remove it."""
    _apply(graph, passes.IdentityEliminationPass())


def share_weights(graph: onnx.GraphProto, folder: pathlib.Path) -> None:
    """Deduplicate equal weights: a layer that is applied eight times stores its weights once.

    Biases are not shared: the scale of a quantized bias depends on the input of its layer, which differs.

    Args:
      folder: location of external weights.
    """
    _apply(graph, _ShareWeights(), folder)


class _ShareWeights(ir.passes.InPlacePass):
    """Deduplication of all constants but vectors and scalars, which the pass of onnx-ir cannot leave out."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        constants = model.graph.initializers
        kept = {name: value for name, value in constants.items() if value.shape is None or len(value.shape) < 2}
        for name in kept:
            del constants[name]
        result = passes.DeduplicateHashedInitializersPass()(model)
        constants.update(kept)
        return result


def check(model: onnx.ModelProto, folder: pathlib.Path) -> None:
    """Raise ValueError unless a model is valid ONNX; its weights are not read.

    Args:
      folder: location of external weights.
    """
    checked = ir.serde.deserialize_model(model)
    ir.external_data.set_base_dir(checked.graph, folder)
    passes.CheckerPass()(checked)


def _apply(graph: onnx.GraphProto, change: ir.passes.InPlacePass, folder: pathlib.Path | None = None) -> None:
    """Run an onnx-ir pass on a graph, in place; references to its nodes and constants become invalid.

    Args:
      folder: location of external weights, for a pass that reads them.
    Raises:
      ValueError: a rewrite left a node that reads a value which nothing defines; onnx-ir would only log that.
    """
    defined = {'', *(value.name for value in graph.input), *(tensor.name for tensor in graph.initializer)}
    defined |= {name for node in graph.node for name in node.output}
    missing = sorted({name for node in graph.node for name in node.input} - defined)
    if missing:
        raise ValueError(f'{graph.name}: nothing defines {", ".join(missing)}, which a node reads')
    model = ir.Model(ir.serde.deserialize_graph(graph), ir_version=onnx.IR_VERSION)
    if folder is not None:
        ir.external_data.set_base_dir(model.graph, folder)
    change(model)
    graph.CopyFrom(ir.serde.serialize_graph(model.graph))


def new_constant(
    graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto], name: str, array: np.ndarray | np.generic
) -> str:
    """Add a constant unless one of that name exists; return the name."""
    if name not in constants:
        constants[name] = numpy_helper.from_array(np.asarray(array), name)
        graph.initializer.append(constants[name])
    return name
