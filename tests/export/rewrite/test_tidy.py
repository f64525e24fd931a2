"""Rewrites of ONNX graphs: they preserve the function and produce the form suited to the phone."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export.graphs.runners import OnnxSession
from export.graphs.table import PhoneGraph
from export.graphs.to_onnx import to_onnx
from export.measure.snr import snr_db
from export.quantize.qdq import to_w8a16
from export.quantize.rounding_noise import Group, _worst_apart, rounded
from export.quantize.two_parts import double_weights
from export.rewrite import tidy as rewrites
from neodragon_jax.models.super_resolution import depth_to_space
from neodragon_jax.models.vae_decoder import double_space
from support.arrays import normal

EXACT_DB = 115.0


def exported(
    function: Callable[..., jax.Array], inputs: Mapping[str, tuple[int, ...]], folder: pathlib.Path
) -> collections.Counter[str]:
    """Export a function, check the graph against it on noise, and return its operations."""
    path = folder / 'graph.onnx'
    path.unlink(missing_ok=True)
    counts = to_onnx(PhoneGraph('any', lambda _, *arrays: function(*arrays), inputs, ('y',)), path)
    feeds = {name: normal(seed, *shape) for seed, (name, shape) in enumerate(inputs.items())}
    assert snr_db(np.asarray(function(*feeds.values())), OnnxSession(path).run(feeds)['y']) > EXACT_DB
    onnx.checker.check_model(onnx.load(path))
    return counts


def conv(features: int, size: int = 3, strides: int = 1, seed: int = 0) -> Callable[[jax.Array], Any]:
    """Return a convolution with fixed weights."""
    layer = nn.Conv(features, (size, size), (strides, strides), padding=((size // 2, size // 2),) * 2, parent=None)

    def apply(x: jax.Array) -> Any:
        params = {'kernel': normal(seed, size, size, x.shape[-1], features) / 5, 'bias': normal(seed + 1, features)}
        return layer.apply({'params': params}, x)

    return apply


def test_pictures_are_turned_at_both_ends_only(tmp_path):
    """Skips, per-channel constants, concatenations, splits and resizes between convolutions need no transpose."""
    shift = normal(9, 6)

    def network(x: jax.Array, memory: jax.Array) -> jax.Array:
        y = nn.relu(conv(6)(x))
        y = conv(6, 1)(jnp.concatenate([y, memory], axis=-1)) * shift + y
        first, second = jnp.split(conv(12)(double_space(y)), 2, axis=-1)
        return conv(4, 3, 2)(first * nn.sigmoid(second))

    counts = exported(network, {'x': (1, 6, 10, 3), 'memory': (1, 6, 10, 6)}, tmp_path)
    assert counts['Transpose'] == 3, 'two inputs and an output'
    assert counts['Conv'] == 4 and counts['Resize'] == 1
    graph = onnx.load(tmp_path / 'graph.onnx').graph
    (resize,) = (node for node in graph.node if node.op_type == 'Resize')
    assert rewrites.attribute(resize, 'coordinate_transformation_mode') == b'asymmetric'
    assert rewrites.attribute(resize, 'nearest_mode') == b'floor'
    assert not any(rewrites.attribute(node, 'auto_pad') for node in graph.node)


def test_pixels_as_tokens_are_turned_where_they_are_needed(tmp_path):
    weights = normal(3, 8, 8)

    def network(x: jax.Array) -> jax.Array:
        y = conv(8)(x)
        tokens = y.reshape(-1, 8) @ weights
        return conv(3)(y + tokens.reshape(y.shape))

    counts = exported(network, {'x': (1, 4, 6, 3)}, tmp_path)
    assert counts['Transpose'] == 4


@pytest.mark.parametrize('order', ['CRD', 'DCR'])
def test_depth_to_space_is_one_operation(order, tmp_path):
    def enlarged(x: jax.Array) -> jax.Array:
        y = jnp.clip(conv(12)(x), 0, 1)
        if order == 'CRD':
            return depth_to_space(y, 2)
        batch, height, width, _ = y.shape
        return y.reshape(batch, height, width, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(1, 2 * height, 2 * width, 3)

    counts = exported(enlarged, {'x': (1, 5, 7, 3)}, tmp_path)
    assert counts == {'Conv': 1, 'Clip': 1, 'DepthToSpace': 1, 'Transpose': 2}
    (node,) = (node for node in onnx.load(tmp_path / 'graph.onnx').graph.node if node.op_type == 'DepthToSpace')
    assert rewrites.attribute(node, 'mode').decode() == order


def test_scale_of_attention_moves_into_the_query_weights(tmp_path):
    query, key = normal(1, 8, 8), normal(2, 8, 8)

    def scores(x: jax.Array) -> jax.Array:
        heads = lambda weight: (x @ weight).reshape(6, 2, 4).swapaxes(0, 1)
        return jax.nn.softmax(jnp.matmul(heads(query), heads(key).swapaxes(1, 2)) * 0.3)

    counts = exported(scores, {'x': (6, 8)}, tmp_path)
    assert not counts['Mul'] and not counts['Div']


def test_scale_stays_where_the_layer_has_another_reader(tmp_path):
    weight = normal(1, 8, 8)

    def network(x: jax.Array) -> jax.Array:
        y = x @ weight
        return y * 0.5 + jnp.tanh(y)

    assert exported(network, {'x': (6, 8)}, tmp_path)['Mul'] == 1


def test_layer_applied_often_has_its_weights_once(tmp_path):
    layer = conv(8)
    exported(lambda x: layer(layer(layer(x))), {'x': (1, 4, 4, 8)}, tmp_path)
    tensors = onnx.load(tmp_path / 'graph.onnx').graph.initializer
    assert [len(tensor.dims) for tensor in tensors].count(4) == 1
    assert [len(tensor.dims) for tensor in tensors].count(1) == 3, 'quantized biases differ'


def test_gelu_floor_changes_nothing_in_float32(tmp_path):
    function = lambda x: nn.gelu(x, approximate=False)
    path = tmp_path / 'graph.onnx'
    counts = to_onnx(PhoneGraph('any', lambda _, x: function(x), {'x': (4, 64)}, ('y',), gelu_floor=-6.0), path)
    assert counts == {'Max': 1, 'Gelu': 1}
    x = np.linspace(-50, 10, 256, dtype=np.float32).reshape(4, 64)
    np.testing.assert_allclose(OnnxSession(path).run({'x': x})['y'], np.asarray(function(x)), atol=1e-6)


def test_quantizing_again_leaves_nothing_of_the_time_before(tmp_path):
    """The library would append the weights to an existing file."""
    source, destination, sizes = tmp_path / 'float.onnx', tmp_path / 'quantized.onnx', []
    exported(conv(32), {'x': (1, 4, 4, 32)}, tmp_path)
    model = onnx.load(tmp_path / 'graph.onnx')
    onnx.save(model, source, save_as_external_data=True, location='float.weights', size_threshold=64)
    for _ in range(2):
        to_w8a16(source, destination, [{'x': normal(4, 1, 4, 4, 32)}])
        sizes.append(destination.with_name('quantized.onnx.data').stat().st_size)
    assert sizes[0] == sizes[1]


def test_weights_in_two_parts_are_the_weights(tmp_path):
    """The two parts of 8 bits each are together far more precise than one part."""
    layer = conv(8)
    exported(lambda x: layer(layer(x)), {'x': (1, 4, 4, 8)}, tmp_path)
    model = onnx.load(tmp_path / 'graph.onnx')
    (weight,) = (tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 4)
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}[weight]
    double_weights(model.graph, [weight], tmp_path)
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / 'doubled.onnx')
    kinds = collections.Counter(node.op_type for node in model.graph.node)
    assert kinds == {'Conv': 4, 'Add': 2, 'Transpose': 2}
    feeds = {'x': normal(4, 1, 4, 4, 8)}
    want, got = (OnnxSession(tmp_path / name).run(feeds)['y'] for name in ('graph.onnx', 'doubled.onnx'))
    assert snr_db(want, got) > EXACT_DB
    coarse, fine = (
        numpy_helper.to_array(rewrites.constants_of(model.graph)[f'{weight}_{k}']) for k in ('coarse', 'fine')
    )
    assert snr_db(before, coarse) < 60 < snr_db(before, coarse + rounded(fine, 0))
    np.testing.assert_array_equal(rounded(coarse, 0), coarse)


def test_what_nobody_reads_is_dropped():
    inputs = [helper.make_tensor_value_info('x', 1, [2])]
    constants = [numpy_helper.from_array(np.ones(2, np.float32), name) for name in ('used', 'unused')]
    nodes = [helper.make_node('Add', ['x', 'used'], ['y']), helper.make_node('Add', ['x', 'unused'], ['z'])]
    graph = helper.make_graph(nodes, 'g', inputs, [helper.make_tensor_value_info('y', 1, [2])], constants)
    rewrites.drop_unused(graph)
    assert [node.output[0] for node in graph.node] == ['y'] and [t.name for t in graph.initializer] == ['used']


def test_the_worst_of_many_weights_are_found_in_few_runs():
    """Two weights of a hundred that cause nearly all of the error end up in groups of one."""
    names = [f'w{index}' for index in range(100)]
    noise = dict.fromkeys(names, 1.0) | {'w17': 500.0, 'w60': 300.0}
    runs = []

    def measure(part: Sequence[str]) -> Group:
        runs.append(part)
        return Group(tuple(part), len(part), sum(noise[name] for name in part))

    groups = _worst_apart(names, measure, runs=32)
    assert len(runs) <= 32 and [name for group in groups for name in group.names] == names
    alone = {group.names[0] for group in groups if len(group.names) == 1}
    assert {'w17', 'w60'} <= alone and len(groups) < len(names)
    assert [len(group.names) for group in _worst_apart(names[:20], measure, runs=32)] == [1] * 20
