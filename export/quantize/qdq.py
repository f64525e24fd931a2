"""Conversion of float ONNX graphs for the HTP: W8A16 with quantize/dequantize pairs, or a form that is safe in FP16.

W8A16: weights in 8 bits with one scale per output channel, activations in 16 bits. Keys and values are second operands
of matrix products, which the HTP treats as weights. They are explicitly converted to symmetric 8 or 16 bits, because
QNN's provider would otherwise silently convert them to 8. Source: arXiv 2511.06055, section 4.
"""

from __future__ import annotations

import itertools
import math
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config
from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX

from export.graphs.table import Feeds
from export.quantize.adaround import Rounding, apply
from export.quantize.indexed_model import indexed_quantizer
from export.quantize.ranges import MARGIN, OnOutputs, measure_ranges
from export.rewrite.onnx_graph import constants_of, drop_unused, external_files, producers_of

_REORDERING = ('Transpose', 'Reshape')
_SYMMETRIC = {8: QuantType.QInt8, 16: QuantType.QInt16}


def to_w8a16(
    source: pathlib.Path,
    destination: pathlib.Path,
    feeds: Iterable[Feeds],
    margin: float = MARGIN,
    key_value_bits: int = 16,
    on_outputs: OnOutputs | None = None,
) -> None:
    """Write the W8A16 form of a float graph, and the measured ranges beside it.

    Args:
      feeds: calibration inputs, read one by one.
      margin: factor by which the range of an activation exceeds the measured one.
      key_value_bits: as in `quantize`.
      on_outputs: as in `measure_extremes`.
    """
    ranges = destination.with_name('ranges.json')
    operations = quantized_operations(source)
    measure_ranges(source, ranges, lambda: feeds, operations, margin=margin, on_outputs=on_outputs)
    quantize(source, destination, ranges, key_value_bits=key_value_bits)


def quantized_operations(source: pathlib.Path) -> list[str]:
    """Return the kinds of nodes that are quantized in a graph."""
    return _config(onnx.load(source, load_external_data=False), {}).op_types_to_quantize


def quantize(
    source: pathlib.Path,
    destination: pathlib.Path,
    ranges: pathlib.Path,
    rounding: Rounding | None = None,
    key_value_bits: int = 16,
) -> None:
    """Write the W8A16 form of a float graph with given ranges.

    Args:
      ranges: file that `measure_ranges` wrote.
      rounding: rounded weights; all others are rounded to nearest.
      key_value_bits: 8 or 16, bits of keys and values (the computed second operands of matrix products).
    """
    model = onnx.load(source, load_external_data=False)
    overrides, start = _overrides(model.graph, key_value_bits), source
    if rounding is not None:
        # Beside the source, because external weights are found by relative paths.
        start = source.with_name(f'.{source.stem}.rounded.onnx')
        overrides |= {name: _given(scales) for name, scales in apply(model.graph, rounding).items()}
        onnx.save(model, start)
    try:
        _quantize(start, destination, ranges, _config(model, overrides))
    finally:
        if start != source:
            start.unlink()
    _float_gains(destination, model)


def _quantize(source: pathlib.Path, destination: pathlib.Path, ranges: pathlib.Path, config: Any) -> None:
    for old in destination.parent.glob(f'{destination.name}*'):
        old.unlink()  # weights would be appended to an existing file
    with indexed_quantizer():
        quantize_static(
            source,
            destination,
            None,
            calibration_cache_path=ranges,
            activation_type=config.activation_type,
            weight_type=config.weight_type,
            op_types_to_quantize=config.op_types_to_quantize,
            per_channel=config.per_channel,
            use_external_data_format=config.use_external_data_format,
            extra_options=config.extra_options,
        )


def _given(scales: np.ndarray) -> list[dict[str, Any]]:
    """Return the quantization parameters of a weight for given scales, one entry per output channel."""
    shared = {'axis': 0, 'quant_type': QuantType.QInt8, 'zero_point': np.int8(0)}
    return [shared | {'scale': scale} for scale in scales]


def _float_gains(path: pathlib.Path, source: onnx.ModelProto) -> None:
    """Connect group norms to the float values of their gains and biases.

    QNN's provider has no quantized group norm: it computes in FP16, between conversions of its input and output.
    Each gain or bias in 16 bits would only add a conversion.
    """
    model = onnx.load(path, load_external_data=False)
    norms = [node for node in model.graph.node if node.op_type == 'GroupNormalization']
    if not norms:
        return
    exact, present = constants_of(source.graph), set(constants_of(model.graph))
    producers = producers_of(model.graph)
    for norm, position in itertools.product(norms, (1, 2)):
        name = producers[norm.input[position]].input[0].removesuffix(TENSOR_NAME_QUANT_SUFFIX)
        if name not in present:
            model.graph.initializer.append(exact[name])
            present.add(name)
        norm.input[position] = name
    drop_unused(model.graph)
    onnx.save(model, path)


class _Unread(CalibrationDataReader):
    """Placeholder for calibration inputs when ranges come from a file."""

    def get_next(self) -> Any:
        raise AssertionError('ranges come from a file')


def _config(model: onnx.ModelProto, overrides: dict[str, list[dict[str, Any]]]) -> Any:
    """Return the settings of ONNX Runtime's quantizer for QNN."""
    return get_qnn_qdq_config(
        model,
        _Unread(),
        activation_type=QuantType.QUInt16,
        weight_type=QuantType.QInt8,
        per_channel=True,
        init_overrides=overrides,
    )


def has_computed_operands(source: pathlib.Path) -> bool:
    """Return whether a graph has matrix products of two activations, as attention has."""
    graph = onnx.load(source, load_external_data=False).graph
    constants = constants_of(graph)
    return any(node.op_type == 'MatMul' and node.input[1] not in constants for node in graph.node)


def _overrides(graph: onnx.GraphProto, key_value_bits: int) -> dict[str, list[dict[str, Any]]]:
    """Return the tensors whose quantization differs from the default, by name."""
    constants = {tensor.name for tensor in graph.initializer}
    overrides: dict[str, list[dict[str, Any]]] = {}
    for node in graph.node:
        if node.op_type == 'LayerNormalization':
            overrides[node.input[1]] = [{'quant_type': QuantType.QUInt8, 'symmetric': False}]
        if node.op_type == 'MatMul' and node.input[1] not in constants:
            convert = {'quant_type': _SYMMETRIC[key_value_bits], 'symmetric': True, 'recv_nodes': set()}
            (entry,) = overrides.setdefault(node.input[1], [{'quant_type': QuantType.QUInt16, 'convert': convert}])
            entry['convert']['recv_nodes'].add(node.name)
    return overrides


def to_fp16(source: pathlib.Path, destination: pathlib.Path) -> None:
    """Write a float graph in a form that avoids faulty FP16 kernels of the HTP; the compiler rounds the weights.

    The FP16 kernel of RMSNormalization reads and writes out of bounds for some shapes of rank 3 and 4 (few heads of few
    dimensions), so the norm runs over rows of rank 2. The FP16 kernel of Sigmoid has an absolute error of 5e-4, which
    SiLU multiplies by its input. Sigmoids of vectors are therefore computed as 1 / (1 + exp(-x)), at negligible cost.
    """
    model = onnx.load(source, load_external_data=False)
    shapes = _shapes(onnx.shape_inference.infer_shapes(model).graph)
    nodes = []
    for node in model.graph.node:
        shape = shapes.get(node.input[0], []) if node.input else []
        if node.op_type == 'RMSNormalization' and len(shape) > 2:
            nodes += _norm_over_rows(model.graph, node, shape)
        elif node.op_type == 'Sigmoid' and shape and math.prod(shape[:-1]) == 1:
            nodes += _sigmoid_by_exp(model.graph, node)
        else:
            nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    for data in external_files(model.graph):
        shutil.copyfile(source.parent / data, destination.parent / data)
    onnx.save(model, destination)


def _norm_over_rows(graph: onnx.GraphProto, norm: onnx.NodeProto, shape: list[int]) -> list[onnx.NodeProto]:
    """Return a norm over the last axis between two reshapes."""
    value, out = norm.input[0], norm.output[0]
    rows = [math.prod(shape[:-1]), shape[-1]]
    for name, dims in ((f'{out}_rows_shape', rows), (f'{out}_shape', shape)):
        graph.initializer.append(helper.make_tensor(name, onnx.TensorProto.INT64, [len(dims)], dims))
    inner = onnx.NodeProto.FromString(norm.SerializeToString())
    inner.input[0], inner.output[0] = f'{out}_rows', f'{out}_normed'
    for attribute in inner.attribute:
        if attribute.name == 'axis':
            attribute.i = -1
    return [
        helper.make_node('Reshape', [value, f'{out}_rows_shape'], [f'{out}_rows'], name=f'{norm.name}_rows'),
        inner,
        helper.make_node('Reshape', [f'{out}_normed', f'{out}_shape'], [out], name=f'{norm.name}_heads'),
    ]


def _sigmoid_by_exp(graph: onnx.GraphProto, sigmoid: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return 1 / (1 + exp(-max(x, floor))), with the error relative to the result."""
    (value,), (out,) = sigmoid.input, sigmoid.output
    # exp(-floor) stays within the range of FP16; below the floor a sigmoid is at most 2e-5.
    for name, number in (('floor', -11.0), ('one', 1.0)):
        graph.initializer.append(helper.make_tensor(f'{out}_{name}', onnx.TensorProto.FLOAT, [], [number]))
    steps = [
        ('Max', [value, f'{out}_floor'], f'{out}_bounded'),
        ('Neg', [f'{out}_bounded'], f'{out}_negated'),
        ('Exp', [f'{out}_negated'], f'{out}_exp'),
        ('Add', [f'{out}_exp', f'{out}_one'], f'{out}_denominator'),
        ('Div', [f'{out}_one', f'{out}_denominator'], out),
    ]
    return [helper.make_node(kind, inputs, [result], name=result) for kind, inputs, result in steps]


def _shapes(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """Return the static shape of every value."""
    values = [*graph.input, *graph.value_info, *graph.output]
    return {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}


def quantization_parameters(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Return scale, zero point and type of the quantized inputs and outputs of a graph, by name."""
    graph = onnx.load(path, load_external_data=False).graph
    constants = constants_of(graph)
    # Value -> name of the graph input or output that it equals up to reshapes and transposes.
    inputs, outputs = (
        {value.name: value.name for value in graph.input},
        {value.name: value.name for value in graph.output},
    )
    for node in graph.node:
        if node.op_type in _REORDERING and node.input[0] in inputs:
            inputs[node.output[0]] = inputs[node.input[0]]
    for node in reversed(graph.node):
        if node.op_type in _REORDERING and node.output[0] in outputs:
            outputs[node.input[0]] = outputs[node.output[0]]
    parameters: dict[str, dict[str, Any]] = {}
    for node in graph.node:
        is_input = node.op_type == 'QuantizeLinear' and node.input[0] in inputs
        is_output = node.op_type == 'DequantizeLinear' and node.output[0] in outputs
        if is_input or is_output:
            scale, zero = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
            name = inputs[node.input[0]] if is_input else outputs[node.output[0]]
            parameters[name] = {'type': str(zero.dtype), 'scale': float(scale), 'zero_point': int(zero)}
    return parameters
