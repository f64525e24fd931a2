"""A binary does not depend on the folder that it is compiled in."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.qnn.chipsets import find_target
from export.qnn.compile import provider_options
from export.qnn.htp import HtpSession


@pytest.mark.qnn
def test_binaries_of_two_folders_are_equal(tmp_path, monkeypatch):
    """Also for folders given relative to the working directory."""
    weights = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 8]) for name in ('x', 'y'))
    node = helper.make_node('MatMul', ['x', 'w'], ['y'])
    graph = helper.make_graph([node], 'product', [x], [y], [numpy_helper.from_array(weights, 'w')])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=10)
    monkeypatch.chdir(tmp_path)
    folders = tmp_path / 'one', (tmp_path / 'two').relative_to(tmp_path)
    for folder in folders:
        folder.mkdir()
        onnx.save(model, folder / 'model.onnx')
        options = provider_options(find_target('sm8750'), 'fp16')
        with HtpSession(folder / 'model.onnx', options, context=folder / 'wrapper.onnx') as session:
            got = session.run({'x': np.eye(4, 8, dtype=np.float32)})['y']
        np.testing.assert_allclose(got, weights[:4], atol=1e-2)
    for name in ('wrapper.onnx', 'wrapper_qnn.bin'):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
