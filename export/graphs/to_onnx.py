"""Export of a graph to ONNX in float32, restricted to operations that are native to the phone.

Allowed are the operations that the HTP backend runs without a fallback to the CPU.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from export.graphs.table import PhoneGraph
from export.rewrite.onnx_graph import check, write_shapes
from export.rewrite.tidy import clamp_gelu, tidy
from neodragon_jax.base.errors import InputError

# Shape arithmetic, gathers and comparisons are excluded on purpose: they indicate host work inside the graph.
ALLOWED = frozenset(
    {
        *('Add', 'Sub', 'Mul', 'Max', 'Softmax', 'Gelu', 'Relu', 'Sigmoid', 'Tanh', 'Clip'),
        *('Gemm', 'MatMul', 'Conv', 'LayerNormalization', 'RMSNormalization', 'GroupNormalization'),
        *('Concat', 'Reshape', 'Slice', 'Split', 'Transpose', 'Resize', 'DepthToSpace'),
    }
)

# Weights of more bytes go to a file beside the graph: a protobuf message is limited to two gigabytes.
INLINE_BYTES = 1 << 30


def to_onnx(graph: PhoneGraph, path: pathlib.Path) -> collections.Counter[str]:
    """Write a graph to `path`; large weights go to files beside it whose names start with the name of the graph's file.

    Returns:
      Number of nodes by operation.
    Raises:
      InputError: the exported graph contains operations outside ALLOWED.
    """
    _convert(graph, path)
    model = onnx.load(path, load_external_data=False)
    tidy(model.graph, path.parent)
    if graph.gelu_floor is not None:
        clamp_gelu(model.graph, graph.gelu_floor)
    write_shapes(model.graph)
    check(model, path.parent)
    add_pre_process_metadata(model)  # marks the graph as preprocessed for ONNX Runtime's quantizer
    save(model, path)
    return _allowed_operations(graph, model)


def _convert(graph: PhoneGraph, path: pathlib.Path) -> None:
    """Write the graph as jax2onnx converts it."""
    from jax2onnx import to_onnx as convert

    function = graph.close()

    def traced(*arrays: jax.Array) -> Any:
        with nn.intercept_methods(_native_layer_norm):
            return function(*arrays)

    convert(
        traced,
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in graph.inputs.values()],
        input_names=list(graph.inputs),
        output_names=list(graph.outputs),
        model_name=graph.name,
        return_mode='file',
        output_path=str(path),
        normalization_mode='prefer_native',
    )


def _allowed_operations(graph: PhoneGraph, model: onnx.ModelProto) -> collections.Counter[str]:
    """Return the number of nodes by operation.

    Raises:
      InputError: an operation is not in ALLOWED.
    """
    counts = collections.Counter(node.op_type for node in model.graph.node)
    forbidden = sorted(set(counts) - ALLOWED)
    if forbidden:
        raise InputError(
            f'{graph.name}: the exported graph contains {", ".join(forbidden)}. Move computations on shapes or '
            'positions to the host, or write the operation in another way.'
        )
    return counts


def save(model: onnx.ModelProto, path: pathlib.Path) -> None:
    """Write a model; move inline weights to a separate file if they exceed INLINE_BYTES."""
    inline = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if inline <= INLINE_BYTES:
        onnx.save(model, path)
        return
    location = f'{path.name}.weights'
    path.with_name(location).unlink(missing_ok=True)  # onnx would append to it
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=1024)


def _native_layer_norm(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Run a LayerNorm in the form that jax2onnx exports as one node (a Flax method interceptor).

    jax2onnx recognizes only the one-pass variance with scale and bias; the ONNX node itself computes in two passes.
    """
    module = context.module
    if not isinstance(module, nn.LayerNorm) or context.method_name != '__call__' or module.use_fast_variance:
        return next_call(*args, **kwargs)
    width = args[0].shape[-1]
    params = {'scale': np.ones(width, np.float32), 'bias': np.zeros(width, np.float32)}
    params |= module.variables.get('params', {})
    native = module.clone(parent=None, use_fast_variance=True, use_scale=True, use_bias=True)
    return native.apply({'params': params}, *args, **kwargs)
