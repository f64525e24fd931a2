"""Compiler and simulator processes: failures end in one line and leave no files."""

from __future__ import annotations

import pathlib

import numpy as np
import onnx
import pytest
from onnx import helper

from export.measure.snr import snr_db
from export.qnn.chipsets import find_target
from export.qnn.compile import compile_graph, provider_options
from export.qnn.htp import HtpSession
from neodragon_jax.base.errors import InputError
from support.arrays import normal


def test_chipsets():
    assert find_target('SM8750') == find_target('sm8750')
    assert provider_options(find_target('sm8650'), 'w8a16') == {'soc_model': '57', 'htp_arch': '75'}
    with pytest.raises(InputError, match=r"'sm8651' is unknown.*Snapdragon X Elite"):
        find_target('sm8651')


def make_model(path: pathlib.Path, *kinds: str) -> None:
    """Write a graph that applies operations in sequence to a square matrix."""
    names = ['x', *(f'after_{kind}' for kind in kinds)]
    nodes = [
        helper.make_node(kind, names[i : i + 1], names[i + 1 : i + 2], name=f'my_{kind}')
        for i, kind in enumerate(kinds)
    ]
    x, y = helper.make_tensor_value_info('x', 1, [8, 8]), helper.make_tensor_value_info(names[-1], 1, None)
    graph = helper.make_graph(nodes, 'graph', [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10), path)


@pytest.mark.qnn
def test_failed_compile_leaves_nothing(tmp_path):
    make_model(tmp_path / 'model.onnx', 'Relu', 'Det')
    with pytest.raises(InputError, match='my_Det, type: Det') as failure:
        compile_graph('det', tmp_path / 'model.onnx', tmp_path / 'out', find_target('sm8750'), 'fp16', {})
    assert '\n' not in str(failure.value)
    assert [path.name for path in tmp_path.iterdir()] == ['model.onnx']


@pytest.mark.qnn
def test_dead_session_is_an_error_not_a_hang(tmp_path):
    make_model(tmp_path / 'model.onnx', 'Relu')
    with HtpSession(tmp_path / 'model.onnx', provider_options(find_target('sm8750'), 'fp16')) as session:
        x = normal(0, 8, 8)
        assert snr_db(np.maximum(x, 0), session.run({'x': x})['after_Relu']) > 60
        with pytest.raises(InputError, match='x'):
            session.run({'x': normal(0, 3, 3)})
    with HtpSession(tmp_path / 'model.onnx', provider_options(find_target('sm8750'), 'fp16')) as session:
        session._process.kill()
        with pytest.raises(InputError, match='SIGKILL'):
            session.run({'x': x})
