"""The steps of one graph from JAX to context binaries, each in its own folder.

Folders are named {graph}-{runtime}-{precision}-{chipset}. Their metadata records the inputs: hashes of the weights and
of the previous step's files, options, code and tools. A finished step is skipped (see step_cache.py), so that an
interrupted export resumes and a change repeats only the steps that depend on it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

from export.graphs.table import DENOISER
from export.host.recorded_graph import RecordedGraph
from export.measure.resources import Resources
from export.qnn.chipsets import Target
from export.qnn.compile import compile_graph, provider_options
from export.steps.code_identity import made_by
from export.steps.float_graph import write_float
from export.steps.options import GraphOptions
from export.steps.quantization import write_precise
from export.steps.step_cache import finished, finished_or_made

OnStep = Callable[[str], object]
# Modules whose code determines the result of each kind of step.
FLOAT_CODE, PRECISE_CODE = 'export.steps.float_graph', 'export.steps.quantization'
COMPILE_CODE = 'export.qnn.compile'


@dataclasses.dataclass(frozen=True)
class ExportedGraph:
    """The files and numbers of a finished graph.

    Attributes:
      recorded: the graph and its recorded calls.
      onnx: float graph.
      files: sizes and hashes of its files.
      operations: number of operations by kind.
      resources: time and memory of making the float graph.
      precise: ONNX file of each precision.
      details: metadata of each precision.
      metadata, wrappers: metadata of the context binary and the ONNX file that wraps it, by (precision, chipset).
    """

    recorded: RecordedGraph
    onnx: pathlib.Path
    files: dict[str, Any]
    operations: dict[str, int]
    resources: Resources
    precise: dict[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    details: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    metadata: dict[tuple[str, str], dict[str, Any]] = dataclasses.field(default_factory=dict)
    wrappers: dict[tuple[str, str], pathlib.Path] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The graph's row in the table."""
        return self.recorded.name


def steps_of(name: str, options: GraphOptions, shared: bool) -> int:
    """Return the number of steps reported while a graph is exported and measured."""
    compiled = 0 if shared else len(options.targets)
    return 2 + len(options.precisions_of(name)) * (2 + compiled)


def export_graph(
    recorded: RecordedGraph, options: GraphOptions, key_value_bits: int | None, on_step: OnStep
) -> ExportedGraph:
    """Write a graph in float32 and in its precisions; skip every finished step.

    Args:
      key_value_bits: bits of keys and values of a stage of the denoiser.
      on_step: called with one line per finished step.
    Raises:
      InputError: the graph cannot be exported.
    """
    name = recorded.name

    folder = options.out / f'{name}-onnx-float'
    source = recorded.made_from | {'graph': name} | made_by(FLOAT_CODE)
    made = finished_or_made(folder, source, functools.partial(write_float, recorded))
    exported = ExportedGraph(recorded, folder / f'{name}.onnx', made['files'], made['operations'], made['resources'])
    on_step(f'{name}: ONNX, {sum(exported.operations.values())} operations')
    for precision in options.precisions_of(name):
        folder = options.out / f'{name}-onnx-{precision}'
        source = {'float': made['files']} | _precise_source(recorded, precision, options, key_value_bits)
        write = functools.partial(write_precise, recorded, exported.onnx, precision, options, key_value_bits)
        details = finished_or_made(folder, source, write)
        exported.precise[precision], exported.details[precision] = folder / f'{name}.onnx', details
        on_step(f'{name}: {precision}{_doubled_note(details)}')
    return exported


def _precise_source(
    recorded: RecordedGraph, precision: str, options: GraphOptions, key_value_bits: int | None
) -> dict[str, Any]:
    """Return the inputs that determine a graph at a precision, besides the float graph."""
    source: dict[str, Any] = {'precision': precision, 'calibration_sha256': recorded.calibration_sha256}
    source |= made_by(PRECISE_CODE)
    if precision != 'w8a16':
        return source
    adaround = options.adaround_of(recorded.name)
    if recorded.name.startswith(DENOISER):
        source['key_value_bits'] = key_value_bits
    return source | {
        'calibration_samples': options.samples_of(recorded.name),
        'ranges': list(options.ranges),
        'target_db': recorded.spec.target_db if options.two_parts else None,
        'adaround': None if adaround is None else [adaround.version, adaround.iterations],
    }


def _doubled_note(details: dict[str, Any]) -> str:
    count = len(details.get('doubled_weights', ()))
    return f', {count} weights in two parts' if count else ''


def compile_separately(exported: ExportedGraph, options: GraphOptions, on_step: OnStep) -> None:
    """Compile a graph into a separate binary for every precision and chipset; add metadata and wrappers to the graph.

    Raises:
      InputError: the graph does not compile.
    """
    for precision in exported.precise:
        for target in options.targets:
            key = (precision, target.chipset)
            exported.metadata[key], exported.wrappers[key] = compile_alone(exported, precision, target, options.out)
            seconds = exported.metadata[key]['compile']['seconds']
            on_step(f'{exported.name}: {precision} for {target.chipset}, {seconds} s')


def compile_alone(
    exported: ExportedGraph, precision: str, target: Target, out: pathlib.Path
) -> tuple[dict[str, Any], pathlib.Path]:
    """Compile a graph for a chipset into a separate binary unless it is finished; return metadata and wrapper.

    Raises:
      InputError: the graph does not compile.
    """
    name = exported.name
    folder = out / f'{name}-qnn-{precision}-{target.chipset}'
    files = exported.details[precision]['files']
    source = {'model': files, 'options': provider_options(target, precision)} | made_by(COMPILE_CODE)
    metadata = finished(folder, source)
    if metadata is None:
        metadata = compile_graph(name, exported.precise[precision], folder, target, precision, source)
    return metadata, folder / f'{name}.onnx'
