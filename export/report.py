"""What an export achieved: signal-to-noise ratios against JAX in float32, sizes, compile costs, and the verdict."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
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
    """One graph at one precision.

    Attributes:
      ships: whether this is the precision that the graph ships with.
      operations: nodes of the float ONNX graph.
      target_db: lowest acceptable ratio.
      onnx_db: float ONNX graph on the CPU, against JAX; like the next two, the lowest over the evaluation samples.
      quantised_db: W8A16 graph on the CPU; None for FP16, which no CPU emulates.
      htp_db: context binary on the HTP simulator; None if it was not run.
      binary_mb, compile_s, peak_gb: size of the context binary, and time and memory of making it.
    """

    graph: str
    precision: str
    ships: bool
    operations: int
    target_db: float
    onnx_db: float
    quantised_db: float | None
    htp_db: float | None
    binary_mb: float
    compile_s: float
    peak_gb: float

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
    """One whole generation: the latents of all generated frames against those of JAX in float32."""

    precision: str
    runner: str
    latents_db: float


@dataclasses.dataclass(frozen=True)
class Report:
    """All results of an export, and what they were made from."""

    rows: Sequence[Row]
    videos: Sequence[VideoRow]
    made_from: dict[str, Any]

    @property
    def below_target(self) -> list[str]:
        """One line for every graph that misses its target."""
        return [
            f'{row.graph} in {row.precision}: {row.deploy_db:.1f} dB, target {row.target_db:.0f} dB'
            for row in self.rows
            if row.met is False
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
        lines = [
            '# Export report',
            '',
            'Ratios are 20 log10(|JAX| / |JAX - graph|) in dB against JAX in float32, the lowest over the evaluation '
            'samples. ONNX: float graph on the CPU. QDQ: W8A16 graph on the CPU. HTP: the context binary on the x86 '
            'simulator. * marks the precision that ships.',
            '',
            '| graph | precision | ops | ONNX | QDQ | HTP | target | met | binary MB | compile s | peak GB |',
            '|---|---|---|---|---|---|---|---|---|---|---|',
            *map(_table_line, self.rows),
        ]
        if self.videos:
            lines += ['', '| whole video | on | latents dB |', '|---|---|---|']
            lines += [f'| {video.precision} | {video.runner} | {video.latents_db:.1f} |' for video in self.videos]
        return '\n'.join([*lines, '', '```json', json.dumps(self.made_from, indent=2), '```', ''])


def _table_line(row: Row) -> str:
    met = {True: 'yes', False: 'NO', None: 'not measured'}[row.met]
    cells = [
        row.graph,
        row.precision + ' *' * row.ships,
        row.operations,
        *map(_db, (row.onnx_db, row.quantised_db, row.htp_db, row.target_db)),
        met,
        f'{row.binary_mb:.1f}',
        f'{row.compile_s:.1f}',
        f'{row.peak_gb:.2f}',
    ]
    return f'| {" | ".join(map(str, cells))} |'


def _db(value: float | None) -> str:
    return '-' if value is None else f'{value:.1f}'
