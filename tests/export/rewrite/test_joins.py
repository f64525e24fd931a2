"""Long concatenations are of rank 3, keep every row in its place, and are checked in compiled graphs."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.graphs.runners import OnnxSession
from export.qnn.chipsets import find_target
from export.qnn.compile import compile_graph
from export.quantize.qdq import to_w8a16
from export.rewrite.joins import MOST_ROWS, join_at_rank_three
from export.rewrite.onnx_graph import OPSET, shapes_of, write_shapes
from neodragon_jax.base.errors import InputError

WIDTH = 16


def concatenation(first: int, second: int, rank_three: bool) -> onnx.ModelProto:
    """Return a graph of two matrices, joined by rows and then by columns with the reverse order."""
    value = lambda name, rows, width=WIDTH: helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, width])
    nodes = [
        helper.make_node('Concat', ['a', 'b'], ['rows'], name='by_rows', axis=0),
        helper.make_node('Concat', ['b', 'a'], ['reverse'], name='reversed', axis=-2),
        helper.make_node('Concat', ['rows', 'reverse'], ['y'], name='by_columns', axis=1),
    ]
    ends = [value('a', first), value('b', second)], [value('y', first + second, 2 * WIDTH)]
    graph = helper.make_graph(nodes, 'joins', *ends)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', OPSET)], ir_version=10)
    if rank_three:
        join_at_rank_three(model.graph)
    write_shapes(model.graph)
    onnx.checker.check_model(model, full_check=True)
    return model


def feeds(first: int, second: int) -> dict[str, np.ndarray]:
    """Return inputs that differ in every row."""
    numbers = np.arange((first + second) * WIDTH, dtype=np.float32).reshape(-1, WIDTH) / 1000
    return {'a': numbers[:first], 'b': numbers[first:]}


def ranks(model: onnx.ModelProto) -> set[int]:
    shapes = shapes_of(model.graph)
    return {len(shapes[node.output[0]]) for node in model.graph.node if node.op_type == 'Concat'}


def test_long_concatenations_get_rank_three():
    assert ranks(concatenation(200, 57, rank_three=True)) == {3}
    assert ranks(concatenation(200, 56, rank_three=True)) == {2} and MOST_ROWS == 256


@pytest.mark.parametrize('quantized', [False, True])
def test_every_row_stays_in_its_place(quantized, tmp_path):
    """The rewritten graph equals the original bit for bit, in float32 and in W8A16."""
    results = []
    for rank_three in (False, True):
        path = tmp_path / f'{rank_three}.onnx'
        onnx.save(concatenation(300, 120, rank_three), path)
        if quantized:
            to_w8a16(path, tmp_path / f'{rank_three}-quantized.onnx', [feeds(300, 120)])
            path = tmp_path / f'{rank_three}-quantized.onnx'
        results.append(OnnxSession(path).run(feeds(300, 120))['y'])
    np.testing.assert_array_equal(*results)
    a, b = feeds(300, 120).values()
    want = np.concatenate([np.concatenate([a, b]), np.concatenate([b, a])], axis=1)
    np.testing.assert_allclose(results[0], want, atol=np.abs(want).max() / 2**15 if quantized else 0)


@pytest.mark.qnn
def test_compiled_graphs_are_checked(tmp_path):
    target = find_target('sm8750')

    def compiled(rank_three: bool) -> pathlib.Path:
        onnx.save(concatenation(300, 120, rank_three), tmp_path / 'float.onnx')
        to_w8a16(tmp_path / 'float.onnx', tmp_path / 'graph.onnx', [feeds(300, 120)])
        compile_graph('graph', tmp_path / 'graph.onnx', tmp_path / 'out', target, 'w8a16', {})
        return tmp_path / 'out' / 'graph.onnx'

    assert compiled(rank_three=True).is_file()
    with pytest.raises(InputError, match='joins 420 rows at rank 2'):
        compiled(rank_three=False)
