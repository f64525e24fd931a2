"""The comparison of compiler options: what is refused, and a graph compiled with two sets of options."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.compare_options import main
from export.quantize.qdq import to_w8a16
from export.rewrite.onnx_graph import OPSET


@pytest.mark.parametrize(
    ('arguments', 'complaint'),
    [
        ([], 'nothing to compile'),
        (['missing/graph.onnx'], 'not a graph of an export'),
        (['--full-size-stage', '2', '--options', 'finalisation_3'], 'Did you mean "finalization_3"?'),
        (['--full-size-stage', '2', '--heads', '0'], '--heads is 0'),
    ],
)
def test_wrong_input_is_one_line(arguments, complaint, tmp_path, capsys):
    assert main([*arguments, '--out', str(tmp_path / 'out')]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line and not (tmp_path / 'out').exists()


@pytest.mark.long
@pytest.mark.qnn
def test_a_full_size_stage_is_compiled(tmp_path):
    """With one head of 24: the number of tokens is that of the released stage."""
    arguments = ['--full-size-stage', '0', '--heads', '1', '--options', 'none,finalization_1']
    assert main([*arguments, '--out', str(tmp_path)]) == 0
    graph = onnx.load(tmp_path / 'denoiser_stage0-onnx-w8a16' / 'denoiser_stage0.onnx').graph
    (flow,) = ([size.dim_value for size in value.type.tensor_type.shape.dim] for value in graph.output)
    assert flow == [5 * 8, 64], 'patches of a quarter of 20 x 32'
    none, other = json.loads((tmp_path / 'options.json').read_text())
    assert none['graph'] == other['graph'] == 'denoiser_stage0'
    assert none['operations'] == other['operations'] > 0 and none['binary_mb'] > 0.1
    assert none['estimate']['flat_ms'] > 0


@pytest.mark.qnn
def test_options_are_compared(tmp_path):
    """An option without effect gives the same bytes; the counts are those of the graph before finalization."""
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [32, 64]) for name in ('x', 'y'))
    node = helper.make_node('Gemm', ['x', 'w'], ['y'], name='product')
    graph = helper.make_graph([node], 'product', [x], [y], [numpy_helper.from_array(weights, 'w')])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=10),
              tmp_path / 'float.onnx')  # fmt: skip
    path = tmp_path / 'product-onnx-w8a16' / 'product.onnx'
    path.parent.mkdir()
    to_w8a16(tmp_path / 'float.onnx', path, [{'x': np.random.default_rng(1).normal(size=(32, 64)).astype(np.float32)}])
    out = tmp_path / 'out'
    assert main([str(path), '--options', 'none,finalization_3,spill_fill', '--out', str(out)]) == 0
    rows = {row['variant']: row for row in json.loads((out / 'options.json').read_text())}
    assert rows['spill_fill']['binary_sha256'] == rows['none']['binary_sha256']
    assert rows['finalization_3']['same_as_none'] is False
    assert len({(row['operations'], row['moved_mb']) for row in rows.values()}) == 1
    assert '| product | finalization_3 |' in (out / 'options.md').read_text()
