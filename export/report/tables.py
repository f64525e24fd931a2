"""The tables of a report, column by column."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from export.measure.resources import Resources
from export.qnn.latency import show
from export.report.rows import STEPS, Row, SharedBinary, VideoRow

INTRODUCTION = (
    'SNR (signal-to-noise ratio) in dB: 20 log10(|JAX| / |JAX - graph|), against JAX in float32, on prompts that',
    'calibration did not see. ONNX: float graph on the CPU. QDQ: W8A16 graph on the CPU, the lowest SNR over all',
    'evaluation prompts, and the median of the lowest SNR per prompt. HTP: context binary on the x86 simulator, the',
    'lowest over the calls with the lowest SNR on the CPU. The lowest SNR is compared with the target. * marks the',
    'precision that ships.',
    'Weights are in two parts of 8 bits where the target needs it, and in the patch embedding of the denoiser.',
    'Settings were chosen on validation prompts, which are neither calibration nor evaluation prompts. All are listed',
    'at the end, with the bits of keys and values.',
)
STATIC = (
    'Counted in the graph that QNN compiles: bytes that operations write, transposes, and operations that leave fixed',
    'point (floats). A graph with an operation on the CPU is refused. Latencies are ESTIMATES for a Snapdragon 8',
    'Elite (export/qnn/latency.py); nothing here ran on a phone. The last column holds the latencies that the paper',
    'measured on its own graphs.',
)
RESOURCES = (
    'Seconds / peak GB of each step when it was done; a step that was finished earlier keeps its numbers. Compiler and',
    'simulator run in separate processes, the other steps share one. A binary of several graphs (+) is compiled once',
    'for all of them. "-" marks a step that was not done, or memory that is not reported.',
)
SHARED = (
    'Graphs compiled into one binary store equal weights once. "constants" counts those of every graph separately, a',
    'lower bound on separate binaries; "separate" is the sum of these, which only --compare compiles.',
)
_MET = {True: 'yes', False: 'NO', None: 'not measured'}


def _ratio(value: float | None) -> str:
    return '-' if value is None else f'{value:.1f}'


def _used(resources: Resources | None, shared: bool) -> str:
    """Return the cell of a step: seconds / GB."""
    if resources is None:
        return '-'
    memory = resources['peak_gb']
    return f'{resources["seconds"]:.1f} / ' + ('-' if memory is None else f'{memory:.2f}') + ' +' * shared


_NAMES: dict[str, Callable[[Row], object]] = {
    'graph': lambda row: row.graph,
    'precision': lambda row: row.precision + ' *' * row.ships,
    'chipset': lambda row: row.chipset,
}
FIDELITY: dict[str, Callable[[Row], object]] = {
    **_NAMES,
    'ONNX dB': lambda row: _ratio(row.onnx_db),
    'QDQ lowest dB': lambda row: _ratio(row.lowest_db),
    'QDQ median dB': lambda row: _ratio(row.median_db),
    'HTP dB': lambda row: _ratio(row.htp_db),
    'target dB': lambda row: _ratio(row.target_db),
    'met': lambda row: _MET[row.met],
    'weights in two parts': lambda row: row.doubled_weights,
}
COST: dict[str, Callable[[Row], object]] = {
    **_NAMES,
    'ONNX ops': lambda row: row.operations,
    'QNN ops': lambda row: row.qnn_operations,
    'moved MB': lambda row: f'{row.moved_mb:.1f}',
    'transposes': lambda row: row.transposes,
    'transposed MB': lambda row: f'{row.transposed_mb:.2f}',
    'floats': lambda row: row.float_operations,
    'estimated 8 Elite ms (band)': lambda row: show(row.estimated_ms),
    'binary MB': lambda row: f'{row.binary_mb:.1f}' + ' +' * row.shared,
    'paper X Elite / 8 Elite ms': lambda row: ' / '.join(_ratio(value) for value in row.paper_ms.values()),
}
TIMES: dict[str, Callable[[Row], object]] = {
    **_NAMES,
    **{step: lambda row, step=step: _used(row.resources[step], step == 'compile' and row.shared) for step in STEPS},
}
SIZES: dict[str, Callable[[SharedBinary], object]] = {
    'graphs': lambda binary: ', '.join(binary.graphs),
    'precision': lambda binary: binary.precision,
    'chipset': lambda binary: binary.chipset,
    'binary MB': lambda binary: f'{binary.binary_mb:.2f}',
    'constants MB': lambda binary: f'{binary.constants_mb:.2f}',
    'separate MB': lambda binary: '-' if binary.separate_mb is None else f'{binary.separate_mb:.2f}',
    'compile s': lambda binary: f'{binary.compile_s:.1f}',
    'peak GB': lambda binary: f'{binary.peak_gb:.2f}',
}
VIDEOS: dict[str, Callable[[VideoRow], object]] = {
    'graphs': lambda video: video.graphs,
    'on': lambda video: video.runner,
    'videos': lambda video: len(video.latents_db),
    'SNR of the latents, lowest dB': lambda video: _ratio(min(video.latents_db.values())),
    'median dB': lambda video: _ratio(statistics.median(video.latents_db.values())),
    'of the frames, lowest dB': lambda video: _ratio(min(video.frames_db.values(), default=None)),
}


def table(columns: Mapping[str, Callable[[Any], object]], rows: Sequence[Any]) -> list[str]:
    """Return a Markdown table with one line per row."""
    lines = [f'| {" | ".join(columns)} |', '|---' * len(columns) + '|']
    return lines + [f'| {" | ".join(str(cell(row)) for cell in columns.values())} |' for row in rows]


def compared(title: str, reached: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a section with the ratios that graphs reached with several settings; empty if none were compared."""
    rows = {graph: ratios for graph, ratios in reached.items() if ratios}
    if not rows:
        return []
    settings = list(next(iter(rows.values())))
    lines = ['', f'## {title}', '', 'SNR of QDQ on calibration calls, weights in 8 bits, in dB; the best is taken.', '']
    lines += [f'| graph | {" | ".join(settings)} |', '|---' * (1 + len(settings)) + '|']
    return lines + [
        f'| {graph} | {" | ".join(_ratio(ratios[setting]) for setting in settings)} |' for graph, ratios in rows.items()
    ]
