"""Conversion of a float graph to the ONNX file of one precision."""

from __future__ import annotations

import functools
import pathlib
import shutil
from typing import TYPE_CHECKING, Any

from export.graphs.runners import OnnxSession
from export.graphs.table import DENOISER
from export.measure.resources import inner_bar
from export.measure.snr import lowest_db
from export.quantize.adaround import AdaRound, Rounding, round_weights
from export.quantize.fp16_range import check_fp16_range
from export.quantize.key_value import NATIVE_BITS
from export.quantize.qdq import quantize, quantized_operations, to_fp16, to_w8a16
from export.quantize.ranges import measure_ranges
from export.quantize.stitch import quantize_chain
from export.quantize.two_parts import quantize_to_target

if TYPE_CHECKING:
    from export.host.recorded_graph import RecordedGraph
    from export.steps.options import GraphOptions

# Folder of the choice of the bits of keys and values. It holds the stages with 8 bits if these are chosen.
CANDIDATES = 'denoiser-key-values'


def write_precise(
    graph: RecordedGraph,
    source: pathlib.Path,
    precision: str,
    options: GraphOptions,
    key_value_bits: int | None,
    draft: pathlib.Path,
) -> dict[str, Any]:
    """Write a graph at a precision.

    Args:
      source: float ONNX file.
      key_value_bits: bits of keys and values of a stage of the denoiser; other graphs choose their own.
      draft: folder to write {graph}.onnx into.
    Returns:
      Metadata: the precision, and for W8A16 a summary of the recipe.
    """
    path = draft / f'{graph.name}.onnx'
    if precision == 'fp16':
        to_fp16(source, path)
        # Without quantized graphs no validation videos are recorded.
        calls = graph.validation() or [calls[0] for calls in graph.evaluation().values()]
        peak = check_fp16_range(path, (call.inputs for call in calls))
        return {'precision': precision, 'fp16_peak': peak._asdict()}
    if key_value_bits is not None and graph.name.startswith(DENOISER):
        return {'precision': precision} | _quantize_stage(graph, key_value_bits, path, options)
    return {'precision': precision} | _quantize(graph, source, path, options)


def _quantize_stage(graph: RecordedGraph, bits: int, path: pathlib.Path, options: GraphOptions) -> dict[str, Any]:
    """Write a stage of the denoiser in W8A16, or copy it from the choice of bits; return a summary."""
    doubled = [piece.name for piece in graph.make().pieces if piece.in_two_parts]
    if bits == NATIVE_BITS:
        for file in (options.out / CANDIDATES).glob(f'{path.name}*'):
            shutil.copyfile(file, path.with_name(file.name))
    else:
        write_stage(graph, bits, path)
    reached = lowest_db(OnnxSession(path), graph.validation(), graph.compared)
    return {'ranges': 'minmax', 'key_value_bits': bits, 'doubled_weights': doubled, 'validation_db': reached}


def write_stage(graph: RecordedGraph, key_value_bits: int, path: pathlib.Path) -> None:
    """Write the W8A16 graph of a stage of the denoiser."""
    chain = graph.make()
    with inner_bar(f'{chain.name}, pieces', len(chain.pieces)) as on_piece:
        quantize = functools.partial(to_w8a16, key_value_bits=key_value_bits)
        quantize_chain(chain, path, graph.calibration(), quantize, on_piece)


def _quantize(graph: RecordedGraph, source: pathlib.Path, path: pathlib.Path, options: GraphOptions) -> dict[str, Any]:
    """Write the W8A16 form with the best ranges and as few weights in two parts as the target allows."""
    validation = graph.validation()
    reached = {}
    for method in options.ranges:
        ranges = _ranges_path(path, method)
        measure_ranges(source, ranges, graph.calibration, quantized_operations(source), method)
        if len(options.ranges) > 1:
            quantize(source, path, ranges)
            reached[method] = lowest_db(OnnxSession(path), validation, graph.compared)
    best = max(options.ranges, key=lambda method: reached.get(method, 0))
    ranges = _ranges_path(path, best)
    rounding, rounding_db = None, {}
    adaround = options.adaround_of(graph.name)
    if adaround is not None:
        rounding, rounding_db = _learn_rounding(graph, source, path, ranges, adaround)
    target_db = graph.spec.target_db
    doubled, validation_db = quantize_to_target(
        source, path, ranges, validation, graph.compared, target_db, rounding, options.two_parts
    )
    details = {'ranges': best, 'ranges_db': reached, 'rounding_db': rounding_db}
    return details | {'doubled_weights': doubled, 'validation_db': validation_db}


def _learn_rounding(
    graph: RecordedGraph, source: pathlib.Path, path: pathlib.Path, ranges: pathlib.Path, adaround: AdaRound
) -> tuple[Rounding | None, dict[str, float]]:
    """Return AdaRound's rounding (None if rounding to nearest is at least as good) and the ratios of both in dB."""
    validation, learned = graph.validation(), round_weights(adaround, source, graph.calibration())
    reached = {}
    for name, candidate in (('nearest', None), ('adaround', learned)):
        quantize(source, path, ranges, candidate)
        reached[name] = lowest_db(OnnxSession(path), validation, graph.compared)
    return learned if reached['adaround'] > reached['nearest'] else None, reached


def _ranges_path(path: pathlib.Path, method: str) -> pathlib.Path:
    return path.with_name(f'ranges-{method}.json')
