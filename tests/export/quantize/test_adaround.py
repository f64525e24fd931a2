"""AdaRound: application of learned rounding to graphs, and the learning itself where aimet-onnx is available.

The slow test runs aimet-onnx: NEODRAGON_AIMET=AIMET/bin/python pytest tests/export/quantize/test_adaround.py -m slow
"""

from __future__ import annotations

import os
import pathlib
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export.__main__ import main
from export.graphs import pictures as picture_graphs
from export.graphs.runners import Call, OnnxSession
from export.graphs.to_onnx import to_onnx
from export.measure.snr import lowest_db
from export.quantize import adaround
from export.quantize.adaround import AdaRound, Rounding
from export.quantize.qdq import quantize, quantized_operations
from export.quantize.ranges import measure_ranges
from export.quantize.two_parts import quantize_to_target
from neodragon_jax.base.errors import InputError
from support.goldens import TINY_CHECKPOINT

TARGET_DB = 48.0


@pytest.fixture(scope='module')
def graph(upscaler, tmp_path_factory) -> pathlib.Path:
    """A QuickSRNet in float."""
    path = tmp_path_factory.mktemp('graph') / 'a.onnx'
    to_onnx(picture_graphs.super_resolution(upscaler, 64, 64), path)
    return path


@pytest.fixture(scope='module')
def calls(graph) -> list[Call]:
    rng = np.random.default_rng(0)
    inputs = [{'frame': rng.random((1, 64, 64, 3), np.float32)} for _ in range(4)]
    return [Call(feeds, OnnxSession(graph).run(feeds)) for feeds in inputs]


@pytest.fixture(scope='module')
def ranges(graph, calls) -> pathlib.Path:
    path = graph.with_name('ranges.json')
    measure_ranges(graph, path, lambda: (call.inputs for call in calls), quantized_operations(graph))
    return path


@pytest.fixture
def rounding(graph) -> Rounding:
    """Every weight rounded down, with scales that differ from the quantizer's."""
    model, scales, levels = onnx.load(graph), {}, {}
    weights = {node.input[1] for node in model.graph.node if node.op_type == 'Conv'}
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            array = numpy_helper.to_array(tensor)
            scales[tensor.name] = np.abs(array).max((1, 2, 3)) / np.float32(100)
            levels[tensor.name] = np.floor(array / scales[tensor.name][:, None, None, None]).astype(np.int8)
    assert len(weights) == 4
    return Rounding(levels, scales)


def stored(path: pathlib.Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_levels_and_scales_arrive_unchanged(graph, ranges, rounding, tmp_path):
    quantize(graph, tmp_path / 'q.onnx', ranges, rounding)
    found = stored(tmp_path / 'q.onnx')
    for name, levels in rounding.levels.items():
        np.testing.assert_array_equal(found[f'{name}_quantized'], levels)
        np.testing.assert_array_equal(found[f'{name}_scale'], rounding.scales[name])
    assert [path.name for path in tmp_path.iterdir()] == ['q.onnx']


def test_weights_in_two_parts_keep_what_rounding_left(graph, ranges, rounding, calls, tmp_path):
    """Rounding down misses the target; weights in two parts are not stored with the learned rounding."""
    quantize(graph, tmp_path / 'q.onnx', ranges, rounding)
    assert lowest_db(OnnxSession(tmp_path / 'q.onnx'), calls, ['enlarged']) < TARGET_DB
    doubled, reached = quantize_to_target(
        graph, tmp_path / 'd.onnx', ranges, calls, ['enlarged'], TARGET_DB, rounding=rounding
    )
    assert doubled and reached >= TARGET_DB
    found = stored(tmp_path / 'd.onnx')
    assert f'{doubled[0]}_fine_quantized' in found and f'{doubled[0]}_quantized' not in found


def test_shared_weights_are_learned_once():
    """Two layers share a weight: the first node is returned, and the second gets a copy of the weight."""
    weight = numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float32), 'w')
    nodes = [
        onnx.helper.make_node('Conv', ['x', 'w'], ['y'], name='first'),
        onnx.helper.make_node('Conv', ['y', 'w'], ['z'], name='second'),
    ]
    graph = onnx.helper.make_graph(nodes, 'g', [], [], [weight])
    assert adaround._one_weight_per_layer(graph) == {'w': 'first'}
    assert [node.input[1] for node in graph.node] == ['w', 'w_of_second']
    assert [tensor.name for tensor in graph.initializer] == ['w', 'w_of_second']


@pytest.mark.parametrize(
    ('python', 'iterations', 'message'),
    [
        ('no/such/python', 10, 'no/such/python: no such program'),
        ('', 10, '--adaround : no such program'),
        (sys.executable, 10, 'aimet-onnx does not work there (ModuleNotFoundError'),
        (sys.executable, 0, '--adaround-iterations is 0'),
    ],
)
def test_errors_tell_the_way_out(python, iterations, message):
    with pytest.raises(InputError) as caught:
        adaround.find(python, iterations)
    assert message in str(caught.value)


def test_a_failing_environment_leaves_nothing(graph, calls):
    before = sorted(graph.parent.iterdir())
    with pytest.raises(InputError, match=r'failed on a\.onnx with status 1'):
        adaround.round_weights(AdaRound(sys.executable, 1, '0'), graph, [call.inputs for call in calls])
    assert sorted(graph.parent.iterdir()) == before


def test_the_command_refuses_an_environment_without_it(tmp_path, capsys):
    arguments = ['--checkpoint', str(TINY_CHECKPOINT), '--out', str(tmp_path / 'o'), '--adaround', sys.executable]
    assert main(arguments) == 2
    assert 'AIMET/bin/pip install aimet-onnx' in capsys.readouterr().err and not (tmp_path / 'o').exists()


def test_the_command_refuses_to_do_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(adaround, 'find', lambda python, iterations: AdaRound(python, iterations, '0'))
    arguments = ['--checkpoint', str(TINY_CHECKPOINT), '--out', str(tmp_path / 'o'), '--adaround', 'python']
    assert main([*arguments, '--graphs', 'clip_l']) == 2
    assert 'add one to --graphs' in capsys.readouterr().err and not (tmp_path / 'o').exists()


@pytest.mark.slow
@pytest.mark.skipif('NEODRAGON_AIMET' not in os.environ, reason='NEODRAGON_AIMET names no Python that has aimet-onnx')
def test_it_learns_a_better_rounding(graph, ranges, calls, tmp_path):
    settings = adaround.find(os.environ['NEODRAGON_AIMET'], 300)
    learned = adaround.round_weights(settings, graph, [call.inputs for call in calls])
    reached = {}
    for name, rounding in (('nearest', None), ('adaround', learned)):
        quantize(graph, tmp_path / f'{name}.onnx', ranges, rounding)
        reached[name] = lowest_db(OnnxSession(tmp_path / f'{name}.onnx'), calls, ['enlarged'])
    assert reached['adaround'] > reached['nearest'] + 2
