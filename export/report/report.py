"""What an export achieved: signal-to-noise ratios against JAX in float32, sizes, compile costs, and the verdict."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from export.measure.resources import Resources
from export.report.chart import draw_ratios
from neodragon_jax.base.atomic import atomic_file


@dataclasses.dataclass(frozen=True)
class Row:
    """One graph at one precision on one chipset.

    Attributes:
      ships: whether this is the precision that the graph ships with.
      operations: nodes of the float ONNX graph.
      target_db: lowest acceptable ratio.
      onnx_db: float ONNX graph on the CPU, against JAX; like the next two, the lowest over the evaluation calls.
      quantized_db: W8A16 graph on the CPU; None for FP16, which no CPU emulates.
      htp_db: context binary on the HTP simulator; None if it was not run.
      doubled_weights: weights that take two parts of 8 bits, because the target needs it.
      ranges_db: ratio on calibration calls with each rule for the ranges of activations, if several were compared.
      rounding_db: the same with weights rounded to the nearest and by AdaRound, if that was asked for.
      qnn_operations, moved_mb, transposes, transposed_mb, float_operations: static view of the compiled graph: what
        operations write, and how many of them left fixed point in W8A16.
      binary_mb: size of the context binary.
      shared: whether that binary has other graphs, too; then its size and what compiling took are those of all.
      estimated_ms: latency on a Snapdragon 8 Elite by both models of cost.py; not measured.
      spent: seconds and peak memory of each step, see STEPS; None for a step that was not done.
      paper_ms: latency that the paper measured, by chipset; ours is for a phone to say.
    """

    graph: str
    precision: str
    chipset: str
    ships: bool
    operations: int
    target_db: float
    onnx_db: float
    quantized_db: float | None
    htp_db: float | None
    doubled_weights: int
    ranges_db: Mapping[str, float]
    rounding_db: Mapping[str, float]
    qnn_operations: int
    moved_mb: float
    transposes: int
    transposed_mb: float
    float_operations: int
    binary_mb: float
    shared: bool
    estimated_ms: Mapping[str, float]
    spent: Mapping[str, Resources | None]
    paper_ms: Mapping[str, float | None]

    @property
    def label(self) -> str:
        """What tells it from the other rows."""
        return f'{self.graph}, {self.precision}, {self.chipset}'

    @property
    def deploy_db(self) -> float | None:
        """The ratio nearest to the phone that was measured."""
        return self.quantized_db if self.htp_db is None else self.htp_db

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if nothing was measured."""
        return None if self.deploy_db is None else self.deploy_db >= self.target_db


@dataclasses.dataclass(frozen=True)
class VideoRow:
    """One whole generation against JAX in float32.

    Attributes:
      graphs: what was not JAX: the denoiser, or everything.
      runner: what ran it.
      latents_db: of all generated latent frames.
      frames_db: of the video's bytes, which are rounded; None if the video was not decoded.
    """

    graphs: str
    runner: str
    latents_db: float
    frames_db: float | None = None


@dataclasses.dataclass(frozen=True)
class SharedBinary:
    """One context binary of several graphs.

    Attributes:
      binary_mb: its size.
      constants_mb: constants of all its graphs, each counted for itself: what separate binaries hold at the least.
      apart_mb: sum of the graphs' separate binaries; None if they were not compiled.
      compile_s, peak_gb: of compiling all graphs in one process.
    """

    graphs: Sequence[str]
    precision: str
    chipset: str
    binary_mb: float
    constants_mb: float
    apart_mb: float | None
    compile_s: float
    peak_gb: float


@dataclasses.dataclass(frozen=True)
class Report:
    """All results of an export, and what they were made from.

    Attributes:
      comparison: lines of Markdown about the denoiser against a straightforward export; none unless asked for.
      recording: what recording each video of the calibration set took.
    """

    rows: Sequence[Row]
    videos: Sequence[VideoRow]
    made_from: dict[str, Any]
    shared: Sequence[SharedBinary] = ()
    comparison: Sequence[str] = ()
    recording: Sequence[Resources] = ()

    @property
    def step_seconds(self) -> dict[str, float]:
        """Seconds of every kind of step, all graphs together; what several rows share is counted once."""
        done: dict[str, dict[Any, Resources | None]] = {step: {} for step in STEPS}
        for row in self.rows:
            done['float graph'][row.graph] = row.spent['float graph']
            done['quantize'][row.graph, row.precision] = row.spent['quantize']
            done['simulate'][row.label] = row.spent['simulate']
            if not row.shared:
                done['compile'][row.label] = row.spent['compile']
        seconds = {'recording': sum(spent['seconds'] or 0 for spent in self.recording)}
        seconds |= {step: sum(spent['seconds'] or 0 for spent in each.values() if spent) for step, each in done.items()}
        seconds['compile'] += sum(binary.compile_s for binary in self.shared)
        return seconds

    @property
    def below_target(self) -> list[str]:
        """One line for every graph that misses its target in the precision that it ships with, or in the only one."""
        shipping = {row.graph for row in self.rows if row.ships}
        return [
            f'{row.graph} in {row.precision} for {row.chipset}: {row.deploy_db:.1f} dB, target {row.target_db:.0f} dB'
            for row in self.rows
            if row.met is False and (row.ships or row.graph not in shipping)
        ]

    def write(self, folder: pathlib.Path) -> None:
        """Write report.md, report.json and report.png."""
        rows = [dataclasses.asdict(row) | {'deploy_db': row.deploy_db, 'met': row.met} for row in self.rows]
        videos = [dataclasses.asdict(video) for video in self.videos]
        shared = [dataclasses.asdict(binary) for binary in self.shared]
        values = {'graphs': rows, 'shared_binaries': shared, 'videos': videos, 'made_from': self.made_from}
        values |= {'recording': [dict(spent) for spent in self.recording], 'step_seconds': self.step_seconds}
        with atomic_file(folder / 'report.json') as path:
            path.write_text(json.dumps(values, indent=2) + '\n')
        with atomic_file(folder / 'report.md') as path:
            path.write_text(self.markdown())
        with atomic_file(folder / 'report.png') as path:
            draw_ratios([(row.label, row.deploy_db, row.target_db) for row in self.rows]).save(path)

    def markdown(self) -> str:
        """Return the report as tables."""
        lines = ['# Export report', '', *_INTRODUCTION, '', *_table(_FIDELITY, self.rows), '']
        lines += ['![ratio against target of every graph](report.png)', '']
        lines += ['## What the chipset is given', '', *_STATIC, '', *_table(_COST, self.rows)]
        lines += ['', '## Time and memory', '', *_SPENT, '', *_table(_STEPS, self.rows), '', self._total()]
        if self.shared:
            lines += ['', '## Binaries of several graphs', '', *_SHARED, '', *_table(_SIZES, self.shared)]
        if self.comparison:
            lines += ['', *self.comparison]
        lines += _compared('Ranges of activations', {row.graph: row.ranges_db for row in self.rows})
        lines += _compared('Rounding of weights', {row.graph: row.rounding_db for row in self.rows})
        if self.videos:
            lines += ['', '## Whole video', '', *_table(_VIDEOS, self.videos)]
        return '\n'.join([*lines, '', '```json', json.dumps(self.made_from, indent=2), '```', ''])

    def _total(self) -> str:
        """Return a sentence on the time of all steps."""
        seconds = self.step_seconds
        parts = ', '.join(f'{step} {time / 60:.1f}' for step, time in seconds.items() if time)
        peaks = [spent['peak_gb'] for spent in self.recording if spent['peak_gb']]
        memory = f' Recording took up to {max(peaks):.1f} GB.' if peaks else ''
        return f'All steps: {sum(seconds.values()) / 60:.1f} minutes ({parts}).{memory}'


_INTRODUCTION = (
    'Ratios are 20 log10(|JAX| / |JAX - graph|) in dB against JAX in float32, the lowest over the evaluation calls.',
    'ONNX: float graph on the CPU. QDQ: W8A16 graph on the CPU. HTP: the context binary on the x86 simulator.',
    '* marks the precision that ships; weights in two parts, 8 bits each, are those that the target needs.',
)
_STATIC = (
    'Counted in the graph that QNN compiles: bytes that operations write, transposes, and operations that leave fixed',
    'point (floats). Nothing runs on the CPU: a graph that would is refused. Two models (export/cost.py) ESTIMATE the',
    'latency on a Snapdragon 8 Elite; nothing here ran on a phone. The last column is what the paper measured of its',
    'own graphs.',
)
_SPENT = (
    'Seconds / peak GB of each step when it was done; a step that was kept from an earlier run says what it took then.',
    'Compiling and the simulator have processes of their own, the other steps share one. Where a binary has several',
    'graphs (+), compiling is that of all. - means not done, or memory that this system does not tell.',
)
_SHARED = (
    'Graphs compiled into one binary store equal weights once. "constants" counts those of every graph for itself:',
    'what separate binaries hold at the least; "apart" is the sum of the separate ones, compiled only with --compare.',
)
# What Row.spent has.
STEPS = ('float graph', 'quantize', 'compile', 'simulate')
_MET = {True: 'yes', False: 'NO', None: 'not measured'}
_FIDELITY: dict[str, Callable[[Row], object]] = {
    'graph': lambda row: row.graph,
    'precision': lambda row: row.precision + ' *' * row.ships,
    'chipset': lambda row: row.chipset,
    'ONNX': lambda row: _db(row.onnx_db),
    'QDQ': lambda row: _db(row.quantized_db),
    'HTP': lambda row: _db(row.htp_db),
    'target': lambda row: _db(row.target_db),
    'met': lambda row: _MET[row.met],
    'weights in two parts': lambda row: row.doubled_weights,
}
_COST: dict[str, Callable[[Row], object]] = {
    'graph': lambda row: row.graph,
    'precision': lambda row: row.precision + ' *' * row.ships,
    'chipset': lambda row: row.chipset,
    'ONNX ops': lambda row: row.operations,
    'QNN ops': lambda row: row.qnn_operations,
    'moved MB': lambda row: f'{row.moved_mb:.1f}',
    'transposes': lambda row: row.transposes,
    'transposed MB': lambda row: f'{row.transposed_mb:.2f}',
    'floats': lambda row: row.float_operations,
    'estimated 8 Elite ms, flat / by operation': lambda row: ' / '.join(f'{t:.2f}' for t in row.estimated_ms.values()),
    'binary MB': lambda row: f'{row.binary_mb:.1f}' + ' +' * row.shared,
    'paper X Elite / 8 Elite ms': lambda row: ' / '.join(_db(value) for value in row.paper_ms.values()),
}
_STEPS: dict[str, Callable[[Row], object]] = {
    'graph': lambda row: row.graph,
    'precision': lambda row: row.precision + ' *' * row.ships,
    'chipset': lambda row: row.chipset,
    **{step: lambda row, step=step: _spent(row.spent[step], step == 'compile' and row.shared) for step in STEPS},
}
_SIZES: dict[str, Callable[[SharedBinary], object]] = {
    'graphs': lambda binary: ', '.join(binary.graphs),
    'precision': lambda binary: binary.precision,
    'chipset': lambda binary: binary.chipset,
    'binary MB': lambda binary: f'{binary.binary_mb:.2f}',
    'constants MB': lambda binary: f'{binary.constants_mb:.2f}',
    'apart MB': lambda binary: '-' if binary.apart_mb is None else f'{binary.apart_mb:.2f}',
    'compile s': lambda binary: f'{binary.compile_s:.1f}',
    'peak GB': lambda binary: f'{binary.peak_gb:.2f}',
}
_VIDEOS: dict[str, Callable[[VideoRow], object]] = {
    'graphs': lambda video: video.graphs,
    'on': lambda video: video.runner,
    'latents dB': lambda video: _db(video.latents_db),
    'frames dB': lambda video: _db(video.frames_db),
}


def _table(columns: Mapping[str, Callable[[Any], object]], rows: Sequence[Any]) -> list[str]:
    """Return the lines of a table with one line per row."""
    lines = [f'| {" | ".join(columns)} |', '|---' * len(columns) + '|']
    return lines + [f'| {" | ".join(str(cell(row)) for cell in columns.values())} |' for row in rows]


def _compared(title: str, reached: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a section with the ratios that graphs reached in several ways; nothing where none was compared."""
    rows = {graph: ratios for graph, ratios in reached.items() if ratios}
    if not rows:
        return []
    ways = list(next(iter(rows.values())))
    lines = [
        '',
        f'## {title}',
        '',
        'QDQ on calibration calls, weights in 8 bits, in dB; the best is taken.',
        '',
    ]
    lines += [f'| graph | {" | ".join(ways)} |', '|---' * (1 + len(ways)) + '|']
    return lines + [f'| {graph} | {" | ".join(_db(ratios[way]) for way in ways)} |' for graph, ratios in rows.items()]


def _db(value: float | None) -> str:
    return '-' if value is None else f'{value:.1f}'


def _spent(spent: Resources | None, shared: bool) -> str:
    """Return a step's cell: seconds / GB."""
    if spent is None:
        return '-'
    memory = spent['peak_gb']
    return f'{spent["seconds"]:.1f} / ' + ('-' if memory is None else f'{memory:.2f}') + ' +' * shared
