"""What an export achieved: signal-to-noise ratios against JAX in float32, sizes, compile costs, and the verdict."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from neodragon_jax.atomic import atomic_file


def snr_db(reference: np.ndarray, got: np.ndarray) -> float:
    """Return 20 log10(|reference| / |reference - got|) in dB; 300 where they are equal, -300 for NaN."""
    if not np.isfinite(got).all():
        return -300.0
    signal = np.linalg.norm(np.asarray(reference, np.float64))
    noise = np.linalg.norm(np.asarray(reference, np.float64) - np.asarray(got, np.float64))
    return min(300.0, 20 * math.log10(max(signal, 1e-30) / max(noise, 1e-30)))


@dataclasses.dataclass(frozen=True)
class Row:
    """One graph at one precision on one chipset.

    Attributes:
      ships: whether this is the precision that the graph ships with.
      operations: nodes of the float ONNX graph.
      target_db: lowest acceptable ratio.
      onnx_db: float ONNX graph on the CPU, against JAX; like the next two, the lowest over the evaluation calls.
      quantised_db: W8A16 graph on the CPU; None for FP16, which no CPU emulates.
      htp_db: context binary on the HTP simulator; None if it was not run.
      doubled_weights: weights that take two parts of 8 bits, because the target needs it.
      ranges_db: ratio on calibration calls with each rule for the ranges of activations, if several were compared.
      qnn_operations, moved_mb, transposes, transposed_mb, float_operations: static view of the compiled graph: what
        operations write, and how many of them left fixed point in W8A16.
      binary_mb, compile_s, peak_gb: size of the context binary, and time and memory of making it.
      paper_ms: latency that the paper measured, by chipset; ours is for a phone to say.
    """

    graph: str
    precision: str
    chipset: str
    ships: bool
    operations: int
    target_db: float
    onnx_db: float
    quantised_db: float | None
    htp_db: float | None
    doubled_weights: int
    ranges_db: Mapping[str, float]
    qnn_operations: int
    moved_mb: float
    transposes: int
    transposed_mb: float
    float_operations: int
    binary_mb: float
    compile_s: float
    peak_gb: float
    paper_ms: Mapping[str, float | None]

    @property
    def deploy_db(self) -> float | None:
        """The ratio nearest to the phone that was measured."""
        return self.quantised_db if self.htp_db is None else self.htp_db

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
class Report:
    """All results of an export, and what they were made from."""

    rows: Sequence[Row]
    videos: Sequence[VideoRow]
    made_from: dict[str, Any]

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
        """Write report.md and report.json."""
        rows = [dataclasses.asdict(row) | {'deploy_db': row.deploy_db, 'met': row.met} for row in self.rows]
        videos = [dataclasses.asdict(video) for video in self.videos]
        values = {'graphs': rows, 'videos': videos, 'made_from': self.made_from}
        with atomic_file(folder / 'report.json') as path:
            path.write_text(json.dumps(values, indent=2) + '\n')
        with atomic_file(folder / 'report.md') as path:
            path.write_text(self.markdown())

    def markdown(self) -> str:
        """Return the report as tables."""
        lines = ['# Export report', '', *_INTRODUCTION, '', *_table(_FIDELITY, self.rows), '']
        lines += ['## What the chipset is given', '', *_STATIC, '', *_table(_COST, self.rows)]
        compared = [row for row in self.rows if row.ranges_db]
        if compared:
            rules = list(compared[0].ranges_db)
            lines += ['', '## Ranges of activations', '', 'QDQ on calibration calls, all weights in 8 bits, in dB.', '']
            lines += [f'| graph | {" | ".join(rules)} |', '|---' * (1 + len(rules)) + '|']
            lines += [f'| {row.graph} | {" | ".join(_db(row.ranges_db[rule]) for rule in rules)} |' for row in compared]
        if self.videos:
            lines += ['', '## Whole video', '', '| graphs | on | latents dB | frames dB |', '|---|---|---|---|']
            lines += [
                f'| {video.graphs} | {video.runner} | {_db(video.latents_db)} | {_db(video.frames_db)} |'
                for video in self.videos
            ]
        return '\n'.join([*lines, '', '```json', json.dumps(self.made_from, indent=2), '```', ''])


_INTRODUCTION = (
    'Ratios are 20 log10(|JAX| / |JAX - graph|) in dB against JAX in float32, the lowest over the evaluation calls.',
    'ONNX: float graph on the CPU. QDQ: W8A16 graph on the CPU. HTP: the context binary on the x86 simulator.',
    '* marks the precision that ships; weights in two parts, 8 bits each, are those that the target needs.',
)
_STATIC = (
    'Counted in the graph that QNN compiles: bytes that operations write, transposes, and operations that leave fixed',
    'point. Nothing runs on the CPU: a graph that would is refused. Latency is what the paper measured of its graphs.',
)
_MET = {True: 'yes', False: 'NO', None: 'not measured'}
_FIDELITY: dict[str, Callable[[Row], object]] = {
    'graph': lambda row: row.graph,
    'precision': lambda row: row.precision + ' *' * row.ships,
    'chipset': lambda row: row.chipset,
    'ONNX': lambda row: _db(row.onnx_db),
    'QDQ': lambda row: _db(row.quantised_db),
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
    'float ops': lambda row: row.float_operations,
    'binary MB': lambda row: f'{row.binary_mb:.1f}',
    'compile s': lambda row: f'{row.compile_s:.1f}',
    'peak GB': lambda row: f'{row.peak_gb:.2f}',
    'paper X Elite / 8 Elite ms': lambda row: ' / '.join(_db(value) for value in row.paper_ms.values()),
}


def _table(columns: Mapping[str, Callable[[Row], object]], rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table with one line per row."""
    lines = [f'| {" | ".join(columns)} |', '|---' * len(columns) + '|']
    return lines + [f'| {" | ".join(str(cell(row)) for cell in columns.values())} |' for row in rows]


def _db(value: float | None) -> str:
    return '-' if value is None else f'{value:.1f}'
