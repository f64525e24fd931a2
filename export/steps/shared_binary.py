"""The denoiser's stages in one context binary: one model at three shapes, with its weights stored once.

A phone loads the binary once and runs every stage from it. The x86 simulator cannot load it (see `htp.HtpContext`).
The stages are therefore simulated in the process that compiles them, and the metadata stores the ratios.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from export.host.file_records import FileRecords
from export.qnn.chipsets import Target
from export.qnn.compile import binary_mb, compile_together, provider_options
from export.qnn.htp import ContextGraph
from export.report.rows import SharedBinary
from export.steps.code_identity import made_by
from export.steps.evaluation import RATIOS_CODE, measure_on_cpu
from export.steps.graph import COMPILE_CODE, ExportedGraph, OnStep, compile_alone
from export.steps.options import GraphOptions
from export.steps.ratios import Ratios, simulate, simulated_calls
from export.steps.step_cache import finished

BINARY = 'denoiser'  # first part of the folders' names


def steps_of(stages: Sequence[str], options: GraphOptions) -> int:
    """Return the number of steps that `compile_stages` reports."""
    if not stages:
        return 0
    each = 1 + (len(stages) if options.compare else 0)
    return len(options.precisions_of(stages[0])) * len(options.targets) * each


def compile_stages(stages: Sequence[ExportedGraph], options: GraphOptions, on_step: OnStep) -> list[SharedBinary]:
    """Compile graphs together for every precision and chipset; simulate them on the first chipset.

    Args:
      stages: exported graphs; metadata and wrappers are added to each as for a separate binary.
      on_step: called with one line per finished step.
    Raises:
      InputError: a graph does not compile.
    """
    binaries = []
    for precision in options.precisions_of(stages[0].name):
        for target in options.targets:
            simulated = options.simulate and target == options.targets[0]
            metadata = _compile(stages, precision, target, options, simulated)
            on_step(f'{BINARY}: {precision} for {target.chipset} in one binary, {metadata["compile"]["seconds"]} s')
            separate_mb = _separate_mb(stages, precision, target, options, on_step) if options.compare else None
            binaries.append(_binary(metadata, precision, target, separate_mb))
    return binaries


def _compile(
    stages: Sequence[ExportedGraph], precision: str, target: Target, options: GraphOptions, simulated: bool
) -> dict[str, Any]:
    """Compile the binary unless it is finished and was simulated on the same calls; return its metadata."""
    folder = options.out / f'{BINARY}-qnn-{precision}-{target.chipset}'
    files: dict[str, FileRecords] = {stage.name: stage.details[precision]['files'] for stage in stages}
    source = {'models': files, 'options': provider_options(target, precision)} | made_by(COMPILE_CODE)
    ratios = {stage.name: measure_on_cpu(stage, precision, options) for stage in stages} if simulated else {}
    calls = {
        'calibration_sha256': stages[0].recorded.calibration_sha256,
        'samples': options.simulated_samples,
        'cpu_db': ratios,
        **made_by(RATIOS_CODE),
    }
    metadata = finished(folder, source)
    if metadata is None or (simulated and (metadata['simulated'] or {}).get('calls') != calls):

        def simulate_all(runners: Mapping[str, ContextGraph]) -> dict[str, Any]:
            reached = {
                stage.name: _simulate(stage, runners[stage.name], ratios[stage.name], options) for stage in stages
            }
            return {'calls': calls, 'graphs': reached}

        models = {stage.name: stage.precise[precision] for stage in stages}
        metadata = compile_together(
            BINARY, models, folder, target, precision, source, simulate_all if simulated else None
        )
    for stage in stages:
        _add_to(stage, (precision, target.chipset), folder, metadata, simulated)
    return metadata


def _add_to(
    stage: ExportedGraph, key: tuple[str, str], folder: pathlib.Path, metadata: Mapping[str, Any], simulated: bool
) -> None:
    """Add metadata and wrapper to a stage as for a separate binary."""
    reached = metadata['simulated']['graphs'][stage.name] if simulated else None
    static_view = metadata['graphs'][stage.name]['static_view']
    stage.metadata[key] = {**metadata, 'static_view': static_view, 'simulated': reached, 'shared': True}
    stage.wrappers[key] = folder / f'{stage.name}.onnx'


def _simulate(stage: ExportedGraph, runner: ContextGraph, ratios: Ratios | None, options: GraphOptions) -> Any:
    calls = simulated_calls(stage.recorded, ratios, options.simulated_samples)
    return simulate(runner, stage.recorded, calls, runner.context.peak_gb)


def _separate_mb(
    stages: Sequence[ExportedGraph], precision: str, target: Target, options: GraphOptions, on_step: OnStep
) -> float:
    """Compile a separate binary per stage; return the sum of their sizes."""
    total = 0.0
    for stage in stages:
        metadata, _ = compile_alone(stage, precision, target, options.out)
        total += binary_mb(metadata)
        on_step(f'{stage.name}: {precision} for {target.chipset} separately, {metadata["compile"]["seconds"]} s')
    return total


def _binary(metadata: Mapping[str, Any], precision: str, target: Target, separate_mb: float | None) -> SharedBinary:
    graphs = metadata['graphs']
    return SharedBinary(
        graphs=list(graphs),
        precision=precision,
        chipset=target.chipset,
        binary_mb=binary_mb(metadata),
        constants_mb=sum(graph['static_view']['weights_mb'] for graph in graphs.values()),
        separate_mb=separate_mb,
        compile_s=metadata['compile']['seconds'],
        peak_gb=metadata['compile']['peak_gb'],
    )
