"""Static counts of a compiled graph, from the graph that QNN dumps: operations, bytes, weights, data types.

The HTP is bound by the bytes that operations write far more than by the number of operations. These counts therefore
rank implementations of a model without a phone. Bytes are those of operations' outputs; a megabyte has 10^6 bytes.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from export.rewrite.joins import check_joins
from neodragon_jax.base.errors import InputError

# Provider option for the folder that QNN dumps the graph into.
DUMP = 'json_qnn_graph_dir'
_STATIC = 4  # QNN's number for tensors that hold weights
_FLOATS = {0x216, 0x232}
_FLOAT_32 = 0x232
# Operations that may occur between the product that computes scores and the softmax: each is a pass over the scores.
_ON_SCORES = ('ElementWise', 'Convert', 'Quantize', 'Dequantize', 'Reshape')


@dataclasses.dataclass(frozen=True)
class StaticView:
    """Counts of one graph, by kind of operation; views can be subtracted and scaled to count parts of graphs.

    Attributes:
      operations: number of operations.
      output_mb: megabytes that operations write.
      score_mb: part of `output_mb` that is attention scores, from the product that computes them to the softmax.
      float_operations: number of floating-point operations; unintended in a quantized graph.
      weights_mb: megabytes of constants.
    """

    operations: Mapping[str, float]
    output_mb: Mapping[str, float]
    score_mb: Mapping[str, float]
    float_operations: Mapping[str, float]
    weights_mb: float

    @property
    def moved_mb(self) -> float:
        """Megabytes that operations write, without reshapes, which move no data."""
        return sum(size for kind, size in self.output_mb.items() if kind != 'Reshape')

    @property
    def transposed_share(self) -> float:
        """Bytes written by transposes as a fraction of all other bytes moved."""
        transposed = self.output_mb.get('Transpose', 0.0)
        return transposed / max(self.moved_mb - transposed, 1e-9)

    def summary(self) -> dict[str, Any]:
        """Return the figures of a report."""
        return {
            'operations': round(sum(self.operations.values())),
            'moved_mb': round(self.moved_mb, 2),
            'score_mb': round(sum(self.score_mb.values()), 2),
            'transposes': round(self.operations.get('Transpose', 0)),
            'transposed_mb': round(self.output_mb.get('Transpose', 0.0), 2),
            'weights_mb': round(self.weights_mb, 2),
            'float_operations': {kind: round(count) for kind, count in self.float_operations.items() if count},
        }


def extrapolate(short: StaticView, long: StaticView, repeats: int) -> StaticView:
    """Return the view of a graph that repeats the part `long - short`: short + repeats (long - short)."""

    def line(a: float, b: float) -> float:
        return a + repeats * (b - a)

    def lines(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
        return {kind: line(a.get(kind, 0), b.get(kind, 0)) for kind in {**a, **b}}

    return StaticView(
        operations=lines(short.operations, long.operations),
        output_mb=lines(short.output_mb, long.output_mb),
        score_mb=lines(short.score_mb, long.score_mb),
        float_operations=lines(short.float_operations, long.float_operations),
        weights_mb=line(short.weights_mb, long.weights_mb),
    )


def dump_options(folder: pathlib.Path) -> dict[str, str]:
    """Return the provider options that dump the compiled graph into a folder."""
    return {'dump_json_qnn_graph': '1', DUMP: str(folder.resolve())}


def read_view(folder: pathlib.Path, half: bool = False) -> StaticView:
    """Return the view of the graph that a compilation with `dump_options(folder)` dumped.

    Args:
      half: whether the HTP computes the float32 values of the graph in FP16.
    Raises:
      InputError: there is no graph, or more than one, which means that parts of the model ran elsewhere; or it has a
        concatenation whose order a device does not keep.
    """
    graphs = [content['graph'] for path in sorted(folder.glob('*.json')) if 'graph' in (content := _load(path))]
    if len(graphs) != 1:
        raise InputError(f'{folder}: {len(graphs)} QNN graphs, not one. Check the pinned version of onnxruntime-qnn.')
    check_joins(graphs[0]['nodes'], graphs[0]['tensors'])
    return _view(graphs[0]['nodes'], graphs[0]['tensors'], half)


def _load(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _view(nodes: Mapping[str, Any], tensors: Mapping[str, Any], half: bool) -> StaticView:
    megabytes = lambda name: _bytes(tensors[name], half) / 1e6
    operations, output, scores, floats = (collections.defaultdict[str, float](float) for _ in range(4))
    for node in nodes.values():
        operations[node['type']] += 1
        for name in node['output_names']:
            output[node['type']] += megabytes(name)
            floats[node['type']] += tensors[name]['data_type'] in _FLOATS and tensors[name]['type'] not in (0, 1)
    for kind, name in _score_outputs(nodes):
        scores[kind] += megabytes(name)
    weights = sum(_bytes(tensor, half) for tensor in tensors.values() if tensor['type'] == _STATIC) / 1e6
    return StaticView(dict(operations), dict(output), dict(scores), {k: n for k, n in floats.items() if n}, weights)


def _score_outputs(nodes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the kind of operation and the output of every pass over attention scores."""
    producers = {name: node for node in nodes.values() for name in node['output_names']}
    for node in nodes.values():
        if node['type'] != 'Softmax':
            continue
        yield node['type'], node['output_names'][0]
        name = node['input_names'][0]
        while producer := producers.get(name):
            if producer['type'] != 'Reshape':
                yield producer['type'], name
            if not producer['type'].startswith(_ON_SCORES):
                break
            name = producer['input_names'][0]


def _bytes(tensor: Mapping[str, Any], half: bool) -> int:
    """Return the size of a tensor in bytes; the last two hex digits of a QNN type, read as decimal, are its bits."""
    bits = int(f'{tensor["data_type"] & 0xFF:x}')
    if half and tensor['data_type'] == _FLOAT_32:
        bits = 16
    return math.prod(tensor['dims']) * bits // 8
