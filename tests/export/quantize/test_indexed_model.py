"""The quantizer with an index against the library's own."""

from __future__ import annotations

import contextlib

import pytest

from export.graphs.to_onnx import to_onnx
from export.quantize import qdq
from export.quantize.ranges import measure_ranges
from support.arrays import normal


@pytest.mark.parametrize('name', ['first_frame_decoder', 'clip_l'])
def test_quantized_graphs_are_the_same_bytes(name, graphs, tmp_path, monkeypatch):
    """Convolutions and group norms, or a text tower: attention, layer norms and linears."""
    source, ranges = tmp_path / 'float.onnx', tmp_path / 'ranges.json'
    to_onnx(graphs[name], source)
    feeds = {name: normal(index, *shape) for index, (name, shape) in enumerate(graphs[name].inputs.items())}
    measure_ranges(source, ranges, lambda: [feeds], qdq.quantized_operations(source))
    for form in ('indexed', 'plain'):
        (tmp_path / form).mkdir()
        if form == 'plain':
            monkeypatch.setattr(qdq, 'indexed_quantizer', contextlib.nullcontext)
        qdq.quantize(source, tmp_path / form / 'graph.onnx', ranges, key_value_bits=8)
    plain, indexed = (tmp_path / form for form in ('plain', 'indexed'))
    assert [path.name for path in plain.iterdir()] == [path.name for path in indexed.iterdir()]
    assert all((indexed / path.name).read_bytes() == path.read_bytes() for path in plain.iterdir())
