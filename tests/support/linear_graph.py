"""The smallest graph that QNN compiles."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.quantize.qdq import to_w8a16


def write_linear(folder: pathlib.Path) -> pathlib.Path:
    """Write one linear layer in W8A16, `linear.onnx`, with fixed weights; return its path."""
    generator = np.random.default_rng(0)
    arrays = {'w': generator.standard_normal((16, 16)), 'b': generator.standard_normal(16)}
    graph = helper.make_graph(
        [helper.make_node('Gemm', ['x', 'w', 'b'], ['y'], name='linear')],
        'linear',
        [helper.make_tensor_value_info('x', 1, [8, 16])],
        [helper.make_tensor_value_info('y', 1, [8, 16])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10)
    onnx.save(model, folder / 'float.onnx')
    feeds = [{'x': generator.standard_normal((8, 16)).astype(np.float32)}]
    to_w8a16(folder / 'float.onnx', folder / 'linear.onnx', feeds)
    return folder / 'linear.onnx'
