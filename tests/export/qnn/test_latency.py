"""The static view of a compiled graph, and the latencies estimated from it."""

from __future__ import annotations

import json
import math
import pathlib

import pytest

from export.compare_stage import main
from export.graphs.denoiser import SHIPPED
from export.qnn.chipsets import find_target
from export.qnn.latency import FACTOR, HIGH, LOW, MEASURED, Estimate, estimate
from export.qnn.static_view import StaticView, extrapolate, read_view
from export.steps.comparison import GRAPHS, Subject, compare
from export.steps.form_table import verdict
from export.steps.forms import FormRow, StageSizes
from export.steps.options import GraphOptions
from neodragon_jax.base.errors import InputError
from neodragon_jax.config.neodragon import TINY

INPUT, OUTPUT, NATIVE, STATIC = 0, 1, 3, 4
FLOAT_32, U16, S16, S8 = 0x232, 0x416, 0x316, 0x308


def write_graph(folder: pathlib.Path, name: str = 'graph') -> None:
    """Write a dump like QNN's: attention of 4 queries on 10 keys in 2 heads, after one linear."""
    shapes = {
        'x': (INPUT, FLOAT_32, [4, 6]),
        'x_q': (NATIVE, U16, [4, 6]),
        'weight': (STATIC, S8, [6, 16]),
        'flat': (NATIVE, U16, [4, 16]),
        'split': (NATIVE, U16, [4, 2, 8]),
        'query': (NATIVE, U16, [2, 4, 8]),
        'key': (STATIC, S16, [2, 8, 10]),
        'scores': (NATIVE, U16, [2, 4, 10]),
        'biased': (NATIVE, U16, [2, 4, 10]),
        'weights': (NATIVE, U16, [2, 4, 10]),
        'leak': (NATIVE, FLOAT_32, [2, 4, 10]),
        'y': (OUTPUT, FLOAT_32, [2, 4, 10]),
    }
    steps = [
        ('Quantize', ['x'], 'x_q'),
        ('FullyConnected', ['x_q', 'weight'], 'flat'),
        ('Reshape', ['flat'], 'split'),
        ('Transpose', ['split'], 'query'),
        ('MatMul', ['query', 'key'], 'scores'),
        ('ElementWiseAdd', ['scores'], 'biased'),
        ('Softmax', ['biased'], 'weights'),
        ('Dequantize', ['weights'], 'leak'),
        ('Dequantize', ['leak'], 'y'),
    ]
    nodes = {
        f'{i}': {'type': kind, 'input_names': ins, 'output_names': [out]} for i, (kind, ins, out) in enumerate(steps)
    }
    tensors = {key: dict(zip(('type', 'data_type', 'dims'), entry, strict=True)) for key, entry in shapes.items()}
    (folder / f'{name}.json').write_text(json.dumps({'graph': {'nodes': nodes, 'tensors': tensors}}))
    (folder / f'{name}_tensor_log.json').write_text(json.dumps({'summary': {}}))


def test_view_counts_bytes_by_kind(tmp_path):
    write_graph(tmp_path)
    view = read_view(tmp_path)
    assert view.operations['Dequantize'] == 2 and sum(view.operations.values()) == 9
    micro = {kind: round(size * 1e6) for kind, size in view.output_mb.items()}
    assert micro == {
        'Quantize': 48,
        'FullyConnected': 128,
        'Reshape': 128,
        'Transpose': 128,
        'MatMul': 160,
        'ElementWiseAdd': 160,
        'Softmax': 160,
        'Dequantize': 640,
    }
    assert {kind: round(size * 1e6) for kind, size in view.score_mb.items()} == {
        'MatMul': 160,
        'ElementWiseAdd': 160,
        'Softmax': 160,
    }
    assert round(view.weights_mb * 1e6) == 96 + 320
    assert view.float_operations == {'Dequantize': 1}, 'the output itself is no leak'
    assert round(view.moved_mb * 1e6) == sum(micro.values()) - micro['Reshape']
    assert view.transposed_share == pytest.approx(128 / (1424 - 128))
    assert round(read_view(tmp_path, half=True).output_mb['Dequantize'] * 1e6) == 320


def test_two_graphs_are_a_leak(tmp_path):
    write_graph(tmp_path, 'one')
    write_graph(tmp_path, 'two')
    with pytest.raises(InputError, match='2 QNN graphs'):
        read_view(tmp_path)


def view(moved: float, softmax: float, add: float = 0.0, weights: float = 50.0) -> StaticView:
    scores = {'Softmax': softmax, 'MatMul': softmax} | ({'ElementWiseAdd': add} if add else {})
    return StaticView({'Softmax': 1}, scores | {'FullyConnected': moved - sum(scores.values())}, scores, {}, weights)


def test_estimates_of_one_full_size_block():
    """One masked block of the 1728-token stage gives the megabytes and milliseconds that the models were fitted to."""
    one = 24 * 1728 * 1728 * 2 / 1e6
    masked = estimate(view(674, one, one))
    assert masked.flat_ms == pytest.approx(70.8, abs=0.1)
    assert masked.by_operation_ms == pytest.approx(49.5, abs=0.2)
    assert masked.worst_ms == masked.flat_ms


def test_estimate_has_the_band_of_the_measured_graphs():
    """Every measured graph lies in the band of its own estimate; the extreme ratios lie at its ends."""
    errors = []
    for graph in MEASURED:
        scores = {'Softmax': graph.score_mb}
        modelled = Estimate(flat_ms=0.105 * graph.moved_mb, by_operation_ms=graph.by_operation_ms)
        assert estimate(StaticView({}, scores | {'Other': graph.moved_mb - graph.score_mb}, scores, {}, 0)).ms > 0
        assert modelled.low_ms * 0.999 <= graph.ms <= modelled.high_ms * 1.001
        errors.append(math.log(graph.ms / modelled.ms))
    assert sum(errors) == pytest.approx(0, abs=1e-9), 'the factor is the geometric mean'
    assert (round(LOW, 2), round(FACTOR, 2), round(HIGH, 2)) == (0.95, 1.53, 2.75)
    assert str(Estimate(1.0, 100.0)) == '153 (95 to 275)'


def test_extrapolation_is_exact_for_equal_parts():
    three = extrapolate(view(10, 1), view(16, 3, 2), 2)
    assert three.moved_mb == pytest.approx(22)
    assert three.score_mb == {'Softmax': 5, 'MatMul': 5, 'ElementWiseAdd': 4}
    assert extrapolate(view(10, 1), view(16, 3, 2), 1) == view(16, 3, 2)


def test_verdict_names_what_is_missed():
    row = lambda name, moved, weights: FormRow(
        name, view(moved, 100, weights=weights), estimate(view(moved, 100)), None
    )
    base = row('straightforward', 12000, 1500)
    kept = verdict([base, row('prefix_folded', 7000, 1000)], stage=2)
    assert len(kept) == 3 and not any('MISSED' in line for line in kept)
    missed = verdict([base, row('prefix_folded', 9000, 1200)], stage=2)
    assert [('MISSED' in line) for line in missed] == [True, True, True]
    assert verdict([row('masked', 1, 1)], stage=2) == []


@pytest.mark.long
@pytest.mark.qnn
def test_comparison_for_the_report(tmp_path):
    """The miniature denoiser in both forms, counted in the compiled graphs; the second run reads the stored result."""
    config, size = TINY.denoiser, StageSizes(stages=2, units=1, grid=(4, 4), text_tokens=16)
    subject = Subject(config, size, SHIPPED)
    settings = GraphOptions(tmp_path, [find_target('sm8750')], compare=True)
    steps: list[str] = []
    lines = compare(subject, settings, steps.append)
    assert len(steps) == GRAPHS and any(line.startswith('| straightforward |') for line in lines)
    forms = json.loads((tmp_path / 'denoiser-compare-sm8750' / 'compare.json').read_text())['forms']
    base, best = forms
    assert best['weights_mb'] < base['weights_mb'] and best['operations'] < base['operations']
    assert best['quantized_db'] > 30
    assert compare(subject, settings, steps.append) == lines and steps[GRAPHS:] == ['compared before'] * GRAPHS


@pytest.mark.parametrize(
    ('arguments', 'complaint'),
    [
        (['--forms', 'prefx'], 'Did you mean "prefix"?'),
        (['--forms', ','], '--forms is empty'),
        (['--soc', 'sm875'], 'Did you mean "sm8750"?'),
        (['--blocks', '1'], 'at least two blocks'),
    ],
)
def test_wrong_input_is_one_line(arguments, complaint, tmp_path, capsys):
    assert main(['--out', str(tmp_path / 'out'), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and complaint in line
    assert not (tmp_path / 'out').exists()
