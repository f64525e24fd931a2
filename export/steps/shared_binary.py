"""The stages of the denoiser in one context binary: one model at three shapes, whose weights are then stored once.

A phone loads the binary once and runs any stage out of it. The x86 simulator cannot load it (see `htp.HtpContext`), so
the stages are measured in the process that compiles them, and what was measured is kept in the folder's metadata.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from export.measure.snr import lowest_db
from export.qnn.compile import Target, binary_mb, compile_together, provider_options
from export.qnn.htp import ContextGraph
from export.report.report import SharedBinary
from export.steps.graph import Exported, Settings, compile_alone, kept, makers

OnStep = Callable[[str], object]
BINARY = 'denoiser'  # what the folders' names begin with


def steps_of(settings: Settings) -> int:
    """Return how many steps `compile_stages` reports."""
    if not settings.shared:
        return 0
    each = 1 + (len(settings.shared) if settings.compare else 0)
    return len(settings.precisions_of(settings.shared[0])) * len(settings.targets) * each


def compile_stages(stages: Sequence[Exported], settings: Settings, on_step: OnStep) -> list[SharedBinary]:
    """Compile graphs together for every precision and chipset, unless that is done, and measure them on the first.

    Args:
      stages: exported and quantized; they get metadata and wrappers, as if compiled each by itself.
      on_step: called with the name of each finished step.
    Raises:
      InputError: a graph does not compile.
    """
    binaries = []
    for precision in settings.precisions_of(stages[0].task.name):
        for number, target in enumerate(settings.targets):
            judged = settings.simulate and number == 0
            metadata = _compile(stages, precision, target, settings, judged)
            on_step(f'{BINARY}: {precision} for {target.chipset} in one binary, {metadata["compile"]["seconds"]} s')
            apart = _apart_mb(stages, precision, target, settings, on_step) if settings.compare else None
            binaries.append(_binary(metadata, precision, target, apart))
    return binaries


def _compile(
    stages: Sequence[Exported], precision: str, target: Target, settings: Settings, judged: bool
) -> dict[str, Any]:
    """Return the metadata of the binary, made if it is not there or was not judged on the calls asked for."""
    folder = settings.out / f'{BINARY}-qnn-{precision}-{target.chipset}'
    files = {stage.task.name: stage.details[precision]['files'] for stage in stages}
    source = {'models': files, 'options': provider_options(target, precision)} | makers()
    calls = {'calibration_sha256': settings.calibration_sha256, 'samples': settings.evaluation_samples}
    metadata = kept(folder, source)
    if metadata is None or (judged and (metadata['simulated'] or {}).get('calls') != calls):

        def judge(runners: Mapping[str, ContextGraph]) -> dict[str, Any]:
            return {'calls': calls, 'graphs': {stage.task.name: _judge(stage, runners) for stage in stages}}

        models = {stage.task.name: stage.precise[precision] for stage in stages}
        metadata = compile_together(BINARY, models, folder, target, precision, source, judge if judged else None)
    for stage in stages:
        name, key = stage.task.name, (precision, target.chipset)
        simulated = metadata['simulated']['graphs'][name] if judged else None
        own = {'static_view': metadata['graphs'][name]['static_view'], 'simulated': simulated, 'shared': True}
        stage.metadata[key], stage.wrappers[key] = metadata | own, folder / f'{name}.onnx'
    return metadata


def _judge(stage: Exported, runners: Mapping[str, ContextGraph]) -> dict[str, float]:
    """Return the ratio of a stage on the simulator, and what running it took."""
    task, runner, start = stage.task, runners[stage.task.name], time.monotonic()
    reached = lowest_db(runner, task.evaluation(), task.judged)
    spent = {'seconds': round(time.monotonic() - start, 1), 'peak_gb': round(runner.context.peak_gb(), 2)}
    return {'db': float(reached), **spent}


def _apart_mb(stages: Sequence[Exported], precision: str, target: Target, settings: Settings, on_step: OnStep) -> float:
    """Return the sum of the sizes of separate binaries, compiled for that."""
    total = 0.0
    for stage in stages:
        metadata, _ = compile_alone(stage, precision, target, settings.out)
        total += binary_mb(metadata)
        on_step(f'{stage.task.name}: {precision} for {target.chipset} apart, {metadata["compile"]["seconds"]} s')
    return total


def _binary(metadata: Mapping[str, Any], precision: str, target: Target, apart_mb: float | None) -> SharedBinary:
    graphs = metadata['graphs']
    return SharedBinary(
        graphs=list(graphs),
        precision=precision,
        chipset=target.chipset,
        binary_mb=binary_mb(metadata),
        constants_mb=sum(graph['static_view']['weights_mb'] for graph in graphs.values()),
        apart_mb=apart_mb,
        compile_s=metadata['compile']['seconds'],
        peak_gb=metadata['compile']['peak_gb'],
    )
