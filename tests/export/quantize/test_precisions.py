"""Float graphs, their FP16 form, and the types and ranges of their W8A16 form."""

from __future__ import annotations

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export.graphs.runners import OnnxSession
from export.graphs.table import PhoneGraph
from export.graphs.text import clip_pooled
from export.graphs.to_onnx import to_onnx
from export.measure.snr import snr_db
from export.qnn.chipsets import find_target
from export.qnn.compile import provider_options
from export.qnn.htp import HtpSession
from export.quantize.qdq import to_fp16, to_w8a16
from neodragon_jax.base.errors import InputError
from support.arrays import normal
from support.goldens import TINY_CHECKPOINT

EXACT_DB = 110.0


@pytest.fixture(scope='module')
def tower(tmp_path_factory) -> tuple[PhoneGraph, pathlib.Path]:
    """A text tower as a float ONNX file: small, with norms, attention and linears."""
    graph = clip_pooled('clip_l', TINY_CHECKPOINT / 'text_encoder')
    path = tmp_path_factory.mktemp('tower') / 'graph.onnx'
    to_onnx(graph, path)
    return graph, path


def tower_feeds(graph: PhoneGraph, seed: int) -> dict[str, np.ndarray]:
    feeds = {name: normal(seed, *shape) for name, shape in graph.inputs.items()}
    return feeds | {'end': np.eye(77, dtype=np.float32)[[9]]}


def test_host_work_in_a_graph_is_refused(tmp_path):
    graph = PhoneGraph('denoiser_stage0', lambda _, x: jnp.where(x > 0, x, 0.0), {'x': (4, 4)}, ('y',))
    with pytest.raises(InputError, match='Where'):
        to_onnx(graph, tmp_path / 'graph.onnx')


def test_fp16_form_is_the_same_function(tmp_path):
    """Also with external weights, as in the full-size model."""
    scale = normal(1, 128)

    def norm(x: jax.Array) -> Any:
        return nn.RMSNorm(epsilon=1e-6, parent=None).apply({'params': {'scale': scale}}, x.reshape(6, 4, 128))

    plain, source, destination = tmp_path / 'plain.onnx', tmp_path / 'source.onnx', tmp_path / 'half' / 'graph.onnx'
    destination.parent.mkdir()
    to_onnx(PhoneGraph('any', lambda _, x: norm(x), {'x': (6, 512)}, ('y',)), plain)
    onnx.save(onnx.load(plain), source, save_as_external_data=True, location='source.data', size_threshold=256)
    to_fp16(source, destination)
    feeds = {'x': normal(0, 6, 512)}
    want, got = (OnnxSession(path).run(feeds)['y'] for path in (plain, destination))
    assert snr_db(want, got) > EXACT_DB
    graph = onnx.shape_inference.infer_shapes(onnx.load(destination)).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    assert {ranks[node.input[0]] for node in graph.node if node.op_type == 'RMSNormalization'} == {2}


@pytest.mark.qnn
def test_silu_of_a_vector_in_fp16(tmp_path):
    """Large negative inputs, as in a trained timestep embedding, give small results."""
    source, half, x = tmp_path / 'silu.onnx', tmp_path / 'half.onnx', np.linspace(-12, -3, 96, dtype=np.float32)[None]
    to_onnx(PhoneGraph('any', lambda _, x: nn.silu(x), {'x': (1, 96)}, ('y',)), source)
    to_fp16(source, half)
    want = OnnxSession(source).run({'x': x})['y']
    assert snr_db(want, OnnxSession(half).run({'x': x})['y']) > 60  # exact above -11
    reached = {}
    for path in (source, half):
        with HtpSession(path, provider_options(find_target('sm8750'), 'fp16')) as session:
            reached[path] = snr_db(want, session.run({'x': x})['y'])
    assert reached[half] > 45 and reached[source] < 35


def test_w8a16_types_and_ranges(tower, tmp_path):
    graph, source = tower
    feeds = [tower_feeds(graph, seed) for seed in range(3)]
    path = tmp_path / 'graph.onnx'
    to_w8a16(source, path, iter(feeds), margin=2.0)
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}

    def quantized_with(value: str) -> tuple[np.ndarray, np.ndarray]:
        node = producers[value]
        assert node.op_type == 'DequantizeLinear'
        return constants[node.input[1]], constants[node.input[2]]

    for node in graph.node:
        if node.op_type == 'MatMul':
            assert [quantized_with(name)[1].dtype for name in node.input] == [np.uint16, np.int16]
        if node.op_type == 'Gemm':
            scale, zero = quantized_with(node.input[1])
            assert zero.dtype == np.int8 and scale.shape == constants[producers[node.input[1]].input[0]].shape[-1:]
    scale, zero = next(
        (constants[node.input[1]], constants[node.input[2]])
        for node in graph.node
        if node.op_type == 'QuantizeLinear' and node.input[0] == 'embeddings'
    )
    highest = max(float(feed['embeddings'].max()) for feed in feeds)
    assert (65535 - int(zero)) * float(scale) == pytest.approx(2 * highest, rel=1e-3)
