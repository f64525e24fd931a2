"""Rejection of graphs whose values exceed the range of FP16."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export.quantize.fp16_range import LARGEST, check_fp16_range
from neodragon_jax.base.errors import InputError


def write_square(folder: pathlib.Path, factor: float = 1.0) -> pathlib.Path:
    """Write y = (factor x)^2 / factor^2, which has a small output but large intermediate values."""
    constants = [numpy_helper.from_array(np.float32(value), name) for name, value in (('f', factor), ('g', factor**2))]
    nodes = [
        helper.make_node('Mul', ['x', 'f'], ['scaled']),
        helper.make_node('Mul', ['scaled', 'scaled'], ['square']),
        helper.make_node('Div', ['square', 'g'], ['y']),
    ]
    ends = [helper.make_tensor_value_info(name, 1, [4]) for name in 'xy']
    graph = helper.make_graph(nodes, 'square', ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 23)], ir_version=10), folder / 'g.onnx')
    return folder / 'g.onnx'


def feeds(*values: float) -> list[dict[str, np.ndarray]]:
    return [{'x': np.full(4, value, np.float32)} for value in values]


def test_peak_of_a_graph_inside_the_range(tmp_path):
    peak = check_fp16_range(write_square(tmp_path, 8.0), feeds(-2.0, 1.0))
    assert peak == ('square', 256.0)
    assert check_fp16_range(write_square(tmp_path, 100.0), feeds(0.0)) == ('g', 10000.0), 'a weight'


@pytest.mark.parametrize(
    ('factor', 'value', 'name'), [(100.0, 3.0, 'square'), (300.0, 0.0, 'g'), (1.0, float('nan'), 'x')]
)
def test_what_leaves_the_range_is_refused(factor, value, name, tmp_path):
    with pytest.raises(InputError, match=rf'g\.onnx: {name} reaches .* of FP16'):
        check_fp16_range(write_square(tmp_path, factor), feeds(1e-3, value))
    assert LARGEST == 65504


def test_nothing_measured_is_not_inside(tmp_path):
    with pytest.raises(InputError, match='no calibration inputs'):
        check_fp16_range(write_square(tmp_path), [])
