"""Graph to ONNX, in float32, with every operation native to the phone.

Source of the allowed operations: what the HTP backend runs without a fallback to the CPU.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from export.graphs import Graph
from neodragon_jax.errors import InputError

# Shape arithmetic, gathers and comparisons are absent on purpose: they mean that host work leaked into the graph.
ALLOWED = frozenset(
    {
        *('Add', 'Sub', 'Mul', 'Gemm', 'MatMul', 'Softmax', 'Gelu', 'LayerNormalization', 'RMSNormalization'),
        *('Concat', 'Reshape', 'Slice', 'Split', 'Transpose'),
    }
)


def to_onnx(graph: Graph, path: pathlib.Path) -> collections.Counter[str]:
    """Write a graph as `path`; large weights go to a file `path`.data beside it.

    Returns:
      How many nodes of each operation there are.
    Raises:
      InputError: the export contains operations that the phone should not run.
    """
    from jax2onnx import to_onnx as convert

    def traced(*arrays: jax.Array) -> jax.Array:
        with nn.intercept_methods(_native_layer_norm):
            return graph.function(*arrays)

    convert(
        traced,
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in graph.inputs.values()],
        input_names=list(graph.inputs),
        output_names=[graph.output],
        model_name=graph.name,
        return_mode='file',
        output_path=str(path),
        normalization_mode='prefer_native',
    )
    model = onnx.load(path, load_external_data=False)
    _merge_reshapes(model.graph)
    _fold_query_scale(model.graph, path.parent)
    _drop_unused(model.graph)
    add_pre_process_metadata(model)  # tells ONNX Runtime's quantiser that the graph is clean
    onnx.save(model, path)
    counts = collections.Counter(node.op_type for node in model.graph.node)
    forbidden = sorted(set(counts) - ALLOWED)
    if forbidden:
        raise InputError(
            f'{graph.name}: the exported graph contains {", ".join(forbidden)}. Move what depends on shapes or '
            'positions to the host, or write the operation in another way.'
        )
    return counts


def _native_layer_norm(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Run a LayerNorm in the form that jax2onnx turns into one node (a Flax method interceptor).

    It recognises the one-pass variance with scale and bias only; the node itself computes in two passes.
    """
    module = context.module
    if not isinstance(module, nn.LayerNorm) or context.method_name != '__call__' or module.use_fast_variance:
        return next_call(*args, **kwargs)
    width = args[0].shape[-1]
    params = {'scale': np.ones(width, np.float32), 'bias': np.zeros(width, np.float32)}
    params |= module.variables.get('params', {})
    native = module.clone(parent=None, use_fast_variance=True, use_scale=True, use_bias=True)
    return native.apply({'params': params}, *args, **kwargs)


def _merge_reshapes(graph: onnx.GraphProto) -> None:
    """Let a Reshape that follows a Reshape read what the first one reads."""
    source = {node.output[0]: node.input[0] for node in graph.node if node.op_type == 'Reshape'}
    for node in graph.node:
        while node.op_type == 'Reshape' and node.input[0] in source:
            node.input[0] = source[node.input[0]]


def _fold_query_scale(graph: onnx.GraphProto, folder: pathlib.Path) -> None:
    """Move a constant factor on rotated queries into the gains of the norms they come from.

    Rotation and concatenation are linear, so this is exact, and saves one pass over the queries of every block.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
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
    """Return the RMS norms that a node's outputs are linear in; nothing if they depend on more than those."""
    if node.op_type == 'RMSNormalization':
        return set(node.output)
    found = [behind.get(name, set()) for name in node.input]
    linear = {
        **dict.fromkeys(('Slice', 'Split', 'Reshape'), bool(found and found[0])),
        **dict.fromkeys(('Add', 'Sub', 'Concat'), all(found)),
        'Mul': sum(map(bool, found)) == 1,
    }
    return set().union(*found) if linear.get(node.op_type) else set()


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers that no output depends on."""
    needed = {output.name for output in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(nodes)]
    for position in reversed(range(len(graph.initializer))):
        if graph.initializer[position].name not in needed:
            del graph.initializer[position]
    del graph.node[:]
    graph.node.extend(kept)
