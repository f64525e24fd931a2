"""Export of a graph of the program to a float ONNX file."""

from __future__ import annotations

import pathlib
from typing import Any

from export.graphs.to_onnx import to_onnx
from export.host.recorded_graph import RecordedGraph
from export.measure.resources import inner_bar
from export.quantize.stitch import export_chain


def write_float(recorded: RecordedGraph, draft: pathlib.Path) -> dict[str, Any]:
    """Write {graph}.onnx in float32 into a folder; return metadata: the number of operations by kind."""
    graph, path = recorded.make(), draft / f'{recorded.name}.onnx'
    if graph.pieces:
        with inner_bar(f'{graph.name}, pieces', len(graph.pieces)) as on_piece:
            return {'operations': {'all': export_chain(graph, path, on_piece)}}
    return {'operations': dict(to_onnx(graph, path))}
