"""The fidelity of a finished graph: its ratio against JAX on the calls of every evaluation prompt, see ratios.py."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from export.qnn.chipsets import Target
from export.qnn.compile import binary_mb, provider_options
from export.report.rows import Row
from export.steps.code_identity import made_by
from export.steps.graph import ExportedGraph, OnStep
from export.steps.options import GraphOptions
from export.steps.ratios import Ratios, cpu_ratios, simulate_binary, simulated_calls
from export.steps.step_cache import finished_or_made
from neodragon_jax.base.errors import InputError

# The float graph is the same arithmetic in another order; a lower ratio indicates a wrong export. Most graphs are above
# 100 dB. The exception (84 dB) is a norm over ten million values of a 640x1024 picture, which ONNX Runtime sums in
# float32.
EXPORT_DB = 80.0
# Module whose code determines a measured ratio.
RATIOS_CODE = 'export.steps.ratios'


def check_float(exported: ExportedGraph, options: GraphOptions, on_step: OnStep) -> float:
    """Return the lowest ratio of the float graph, on one call of every evaluation prompt.

    Raises:
      InputError: the float graph does not compute the same function as JAX.
    """
    reached = min(*_lowest_by_prompt(_ratios(exported, 'float', exported.onnx, options, calls=1)).values(), 300.0)
    if reached < EXPORT_DB:
        raise InputError(
            f'{exported.name}: the float ONNX graph is only {reached:.1f} dB from JAX, not {EXPORT_DB:.0f}. '
            'Check the pinned versions of jax2onnx and onnxruntime.'
        )
    on_step(f'{exported.name}: ONNX {reached:.1f} dB')
    return reached


def measure_on_cpu(exported: ExportedGraph, precision: str, options: GraphOptions) -> Ratios | None:
    """Return the ratios of a graph on the CPU; None for FP16, which the CPU does not emulate."""
    if precision != 'w8a16':
        return None
    return _ratios(exported, precision, exported.precise[precision], options, calls=options.evaluation_samples)


def _ratios(exported: ExportedGraph, precision: str, path: pathlib.Path, options: GraphOptions, calls: int) -> Ratios:
    """Return the ratios of an ONNX file on the CPU; the result is cached as a step."""
    recorded = exported.recorded

    def write(draft: pathlib.Path) -> dict[str, Any]:
        ratios = cpu_ratios(recorded, path, calls)
        (draft / 'ratios.json').write_text(json.dumps(ratios, indent=2) + '\n')
        return {'ratios_db': ratios}

    files = exported.files if precision == 'float' else exported.details[precision]['files']
    source = {'model': files, 'calibration_sha256': recorded.calibration_sha256, 'calls': calls}
    folder = options.out / f'{exported.name}-cpu-{precision}'
    return finished_or_made(folder, source | made_by(RATIOS_CODE), write)['ratios_db']


def measure(exported: ExportedGraph, onnx_db: float, options: GraphOptions, on_step: OnStep) -> list[Row]:
    """Return one row of the report per precision and chipset of a compiled graph."""
    rows = []
    for precision in exported.precise:
        ratios = measure_on_cpu(exported, precision, options)
        for target in options.targets:
            first = target == options.targets[0]
            simulated = _simulated(exported, precision, target, ratios, options) if first else None
            rows.append(_row(exported, precision, target, onnx_db, ratios, simulated))
        on_step(f'{exported.name}: {precision}, {_summary(rows[-len(options.targets)])}')
    return rows


def _simulated(
    exported: ExportedGraph, precision: str, target: Target, ratios: Ratios | None, options: GraphOptions
) -> dict[str, float] | None:
    """Return the simulator's result for a binary; a shared binary was measured when it was compiled."""
    if not options.simulate:
        return None
    metadata, recorded = exported.metadata[precision, target.chipset], exported.recorded
    if metadata.get('shared'):
        return metadata['simulated']

    def write(draft: pathlib.Path) -> dict[str, Any]:
        calls = simulated_calls(recorded, ratios, options.simulated_samples)
        wrapper = exported.wrappers[precision, target.chipset]
        simulated = simulate_binary(recorded, wrapper, provider_options(target, precision), calls)
        (draft / 'simulated.json').write_text(json.dumps(simulated, indent=2) + '\n')
        return {'simulated': simulated}

    source = {'binary': metadata['model_files'], 'calibration_sha256': recorded.calibration_sha256}
    source |= {'calls': options.simulated_samples, 'cpu_db': ratios} | made_by(RATIOS_CODE)
    folder = options.out / f'{exported.name}-htp-{precision}-{target.chipset}'
    return finished_or_made(folder, source, write)['simulated']


def _summary(row: Row) -> str:
    return 'not measured' if row.deploy_db is None else f'{row.deploy_db:.1f} dB'


def _lowest_by_prompt(ratios: Ratios) -> dict[str, float]:
    return {prompt: min(found) for prompt, found in ratios.items()}


def _row(
    exported: ExportedGraph,
    precision: str,
    target: Target,
    onnx_db: float,
    ratios: Ratios | None,
    simulated: dict[str, float] | None,
) -> Row:
    """Return a row of the report."""
    metadata, details = exported.metadata[precision, target.chipset], exported.details[precision]
    view, spec = metadata['static_view'], exported.recorded.spec
    return Row(
        graph=exported.name,
        precision=precision,
        chipset=target.chipset,
        ships=precision == spec.precision,
        operations=sum(exported.operations.values()),
        target_db=spec.target_db,
        onnx_db=onnx_db,
        prompts_db={} if ratios is None else _lowest_by_prompt(ratios),
        htp_db=None if simulated is None else simulated['db'],
        doubled_weights=len(details.get('doubled_weights', ())),
        ranges_db=details.get('ranges_db', {}),
        rounding_db=details.get('rounding_db', {}),
        qnn_operations=view['operations'],
        moved_mb=view['moved_mb'],
        transposes=view['transposes'],
        transposed_mb=view['transposed_mb'],
        float_operations=sum(view['float_operations'].values()) if precision == 'w8a16' else 0,
        binary_mb=binary_mb(metadata),
        shared=bool(metadata.get('shared')),
        estimated_ms=view['estimated_ms_on_8_elite'],
        resources={
            'float graph': exported.resources,
            'quantize': details['resources'],
            'compile': metadata['compile'],
            'simulate': simulated,
        },
        paper_ms={'X Elite': spec.x_elite_ms, '8 Elite': spec.elite_8_ms},
    )
