"""The report of an export: report.md, report.json and a picture of the ratios."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from export.measure.resources import Resources
from export.report import tables
from export.report.chart import draw_ratios
from export.report.latency_chart import draw_latencies
from export.report.rows import STEPS, Row, SharedBinary, VideoRow
from neodragon_jax.base.atomic import atomic_file


@dataclasses.dataclass(frozen=True)
class Report:
    """All results of an export.

    Attributes:
      rows: one per graph, precision and chipset.
      videos: one per whole generation.
      made_from: checkpoint, options and tools, as JSON values.
      shared: binaries of several graphs.
      comparison: Markdown lines that compare the denoiser with a straightforward export; empty unless asked for.
      recording: time and memory of recording each video.
      warnings: one line for each reason to trust the ratios less, and for what is not exported.
    """

    rows: Sequence[Row]
    videos: Sequence[VideoRow]
    made_from: Mapping[str, Any]
    shared: Sequence[SharedBinary] = ()
    comparison: Sequence[str] = ()
    recording: Sequence[Resources] = ()
    warnings: Sequence[str] = ()

    @property
    def step_seconds(self) -> dict[str, float]:
        """Seconds of every kind of step over all graphs; a step that several rows share counts once."""
        done: dict[str, dict[Any, Resources | None]] = {step: {} for step in STEPS}
        for row in self.rows:
            done['float graph'][row.graph] = row.resources['float graph']
            done['quantize'][row.graph, row.precision] = row.resources['quantize']
            done['simulate'][row.label] = row.resources['simulate']
            if not row.shared:
                done['compile'][row.label] = row.resources['compile']
        seconds = {'recording': sum(used['seconds'] or 0 for used in self.recording)}
        seconds |= {step: sum(used['seconds'] or 0 for used in each.values() if used) for step, each in done.items()}
        seconds['compile'] += sum(binary.compile_s for binary in self.shared)
        return seconds

    @property
    def below_target(self) -> list[str]:
        """One line for every graph that misses its target in the precision that it ships with, or in the only one."""
        return [
            f'{row.label}: {row.deploy_db:.1f} dB, target {row.target_db:.0f} dB'
            for row in self._deciding_rows()
            if row.met is False
        ]

    @property
    def not_measured(self) -> list[str]:
        """Names of the graphs whose ratio was measured neither on the CPU nor on the simulator."""
        measured = {row.graph for row in self.rows if row.met is not None}
        return list(dict.fromkeys(row.graph for row in self.rows if row.graph not in measured))

    def write(self, folder: pathlib.Path) -> None:
        """Write report.md, report.json and the pictures report.png and latency.png."""
        values = self._values()
        with atomic_file(folder / 'report.json') as path:
            path.write_text(json.dumps(values, indent=2) + '\n')
        with atomic_file(folder / 'report.md') as path:
            path.write_text(self.markdown())
        with atomic_file(folder / 'report.png') as path:
            draw_ratios(self.rows).save(path)
        with atomic_file(folder / 'latency.png') as path:
            draw_latencies(self.rows).save(path)

    def markdown(self) -> str:
        """Return the report as tables."""
        lines = ['# Export report', '']
        lines += [*(f'* **{warning}**' for warning in self.warnings), ''] if self.warnings else []
        lines += [*tables.INTRODUCTION, '', *tables.table(tables.FIDELITY, self.rows), '']
        lines += ['![SNR of every graph for every evaluation prompt](report.png)', '']
        lines += ['## Compiled graphs', '', *tables.STATIC, '', *tables.table(tables.COST, self.rows)]
        lines += ['', '![estimated latency of every graph, and the measured graphs behind it](latency.png)']
        lines += ['', '## Time and memory', '', *tables.RESOURCES, '', *tables.table(tables.TIMES, self.rows)]
        lines += ['', self._total()]
        if self.shared:
            lines += ['', '## Shared binaries', '', *tables.SHARED, '', *tables.table(tables.SIZES, self.shared)]
        if self.comparison:
            lines += ['', *self.comparison]
        lines += tables.compared('Activation ranges', {row.graph: row.ranges_db for row in self.rows})
        lines += tables.compared('Weight rounding', {row.graph: row.rounding_db for row in self.rows})
        if self.videos:
            lines += ['', '## Whole video', '', *tables.table(tables.VIDEOS, self.videos)]
        return '\n'.join([*lines, '', '```json', json.dumps(self.made_from, indent=2), '```', ''])

    def _values(self) -> dict[str, Any]:
        """Return the content of report.json."""
        measured = ('lowest_db', 'median_db', 'deploy_db', 'met')
        rows = [dataclasses.asdict(row) | {name: getattr(row, name) for name in measured} for row in self.rows]
        return {
            'graphs': rows,
            'shared_binaries': [dataclasses.asdict(binary) for binary in self.shared],
            'videos': [dataclasses.asdict(video) for video in self.videos],
            'made_from': dict(self.made_from),
            'recording': [dict(used) for used in self.recording],
            'step_seconds': self.step_seconds,
            'warnings': list(self.warnings),
        }

    def _deciding_rows(self) -> list[Row]:
        """Return the rows that decide the exit status."""
        shipping = {row.graph for row in self.rows if row.ships}
        return [row for row in self.rows if row.ships or row.graph not in shipping]

    def _total(self) -> str:
        """Return a sentence on the time of all steps."""
        seconds = self.step_seconds
        parts = ', '.join(f'{step} {time / 60:.1f}' for step, time in seconds.items() if time)
        peaks = [used['peak_gb'] for used in self.recording if used['peak_gb']]
        memory = f' Recording took up to {max(peaks):.1f} GB.' if peaks else ''
        return f'All steps: {sum(seconds.values()) / 60:.1f} minutes ({parts}).{memory}'
