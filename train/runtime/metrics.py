"""Logs of a run: JSON lines, TensorBoard, the console and a progress bar; from process 0 only."""

from __future__ import annotations

import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
import tensorboardX
from tqdm import tqdm

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.bucket import StoragePath
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import parse_json
from train.runtime.board_pictures import summary_of
from train.runtime.goodput import Goodput, speed
from train.runtime.mirror import Mirror
from train.runtime.peaks import peak_flops
from train.runtime.program import EVALUATION
from train.runtime.step import GUARDED

JSON_LINES = 'metrics.jsonl'
# Metrics on one console line; the files have all of them. Evaluations have separate lines.
CONSOLE_METRICS = 10
# The last of them, however many others a program has: on a pod they are what the user pays for.
SPEED_ON_CONSOLE = ('steps_per_second', 'tflops_per_device', 'mfu')
# Metrics of time, which differ between two runs that are otherwise equal.
SPEED = (*SPEED_ON_CONSOLE, 'goodput')
# Seconds between two progress lines without a terminal.
PROGRESS_EVERY_S = 60.0
# Steps that the host may dispatch ahead of the devices: enough to keep them busy, few enough to bound memory.
STEPS_AHEAD = 2


class MetricsLog:
    """Logs of a run's metrics in its folder. A resumed run first drops the lines after its checkpoint."""

    def __init__(
        self, folder: StoragePath, *, start: int, steps: int, progress: bool = True, shown: Sequence[str] = ()
    ) -> None:
        """Open the logs.

        Args:
          folder: the run's folder; gets `metrics.jsonl` and `tensorboard/`.
          start: steps already done.
          steps: total steps of the run.
          progress: draw a bar when standard error is a terminal, and print a line a minute otherwise.
          shown: metrics that the console shows first.
        Raises:
          InputError: `metrics.jsonl` is damaged.
        """
        self._primary = jax.process_index() == 0
        if not self._primary:
            return
        self._mirror = Mirror(folder, resumed=(JSON_LINES,))
        self._path = self._mirror.local / JSON_LINES
        self._last = _keep_lines(self._path, start)
        self._file = self._path.open('a')
        self._board = tensorboardX.SummaryWriter(str(self._mirror.local / 'tensorboard'), purge_step=start + 1)
        self._shown, self._steps, self._start = tuple(shown), steps, start
        self._lines = progress and not sys.stderr.isatty()
        self._began = self._told = time.monotonic()
        hide = not progress or self._lines
        self._bar = tqdm(total=steps, initial=start, disable=hide, unit='step', dynamic_ncols=True)

    def advance(self, done: int) -> None:
        """Update the progress: the bar, or one line per minute."""
        if not self._primary:
            return
        self._bar.update()
        now = time.monotonic()
        if self._lines and now - self._told >= PROGRESS_EVERY_S:
            self._told = now
            left = (self._steps - done) * (now - self._began) / (done - self._start)
            self.print_line(f'progress  step {done} of {self._steps}, {_duration(left)} left')

    def print_line(self, text: str) -> None:
        """Print a line on the console, above the progress bar."""
        if self._primary:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step, in addition to those that it has; a non-finite number becomes null."""
        if not self._primary:
            return
        plain = {name: float(value) for name, value in values.items()}
        row = {name: value if math.isfinite(value) else None for name, value in plain.items()}
        self._write_row({'step': step} | row)
        for name, value in plain.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)
        for evaluated in (False, True):
            shown = self._to_show({name: plain[name] for name in plain if name.startswith(EVALUATION) == evaluated})
            if shown:
                self.print_line('  '.join([f'step {step}', *(f'{name} {value:.4g}' for name, value in shown.items())]))

    def _write_row(self, row: dict[str, Any]) -> None:
        """Write the row of a step; if the last row is of the same step, extend that one."""
        if self._last.get('step') == row['step']:
            self._file.close()
            row = self._last | row
            _keep_lines(self._path, row['step'] - 1)
            self._file = self._path.open('a')
        self._last = row
        self._file.write(json.dumps(row) + '\n')
        self._file.flush()

    def show(self, step: int, folder: pathlib.Path) -> None:
        """Log the samples of an evaluation as TensorBoard's images."""
        summary = summary_of(folder) if self._primary else None
        if summary is not None:
            assert self._board.file_writer is not None
            self._board.file_writer.add_summary(summary, step)

    def _to_show(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of a console line: the program's choice, guards, others with a value, and the speed."""
        first = [name for name in (*self._shown, *values) if name in self._shown or name.endswith(GUARDED)]
        finite = [name for name, value in values.items() if math.isfinite(value)]
        speed_names = [name for name in SPEED_ON_CONSOLE if name in finite]
        names = [name for name in dict.fromkeys([*first, *finite]) if name in finite and name not in speed_names]
        names = names[: CONSOLE_METRICS - len(speed_names)] + speed_names
        return {name: values[name] for name in names}

    def sync(self) -> None:
        """Copy the logs to the bucket of the run's folder, if it is in one."""
        if self._primary:
            self._board.flush()
            self._mirror.sync()

    def close(self) -> None:
        """Flush and close everything."""
        if self._primary:
            self._bar.close()
            self._board.close()
            self._file.close()
            self._mirror.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


class Window:
    """Metrics of the steps since the last log, kept on the devices until they are read.

    The speed excludes the time of compilation, evaluation, checkpoints and restoring.
    """

    def __init__(self, goodput: Goodput, mesh: jax.sharding.Mesh, counters: Sequence[str] = ()) -> None:
        """Begin a window; `counters` are reported as their last value, other metrics as means."""
        self._goodput, self._counters, self._devices = goodput, counters, mesh.size
        self._peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._begin()

    def _begin(self) -> None:
        self._rows: list[Mapping[str, jax.Array]] = []
        self._flops, self._since = 0.0, self._time_of_steps()

    def _time_of_steps(self) -> float:
        """Return the seconds since the start of the run in which steps could run."""
        return self._goodput.elapsed() - self._goodput.outside_steps()

    def add(self, metrics: Mapping[str, jax.Array], flops: float) -> None:
        """Add the metrics of one step, and wait for an earlier step to limit how far the host runs ahead."""
        self._rows.append(metrics)
        self._flops += flops
        if len(self._rows) > STEPS_AHEAD:
            jax.block_until_ready(self._rows[-1 - STEPS_AHEAD])

    def read(self) -> dict[str, float]:
        """Return means over the window, its counters and its speed; begin a new window."""
        rows = jax.device_get(self._rows)
        seconds = self._time_of_steps() - self._since
        measured = speed(len(rows), seconds, self._flops, self._devices, self._peak)
        counters = {name: float(rows[-1][name]) for name in self._counters}
        self._begin()
        return _means(rows) | counters | measured | {'goodput': self._goodput.fraction()}


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of the finite values of each metric; NaN if there are none."""
    means = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = np.asarray([row[name] for row in rows if name in row], np.float64)
        finite = values[np.isfinite(values)]
        means[name] = float(finite.mean()) if finite.size else math.nan
    return means


def read_metrics(folder: StoragePath) -> list[dict[str, Any]]:
    """Return the rows that a run has logged so far.

    Raises:
      InputError: the file is damaged.
    """
    path = folder / JSON_LINES
    return _rows(path) if path.exists() else []


def _keep_lines(path: pathlib.Path, last: int) -> dict[str, Any]:
    """Drop the rows after a step, and an unfinished last row of a killed process; return the last one, {} for none."""
    if not path.exists():
        return {}
    kept = [row for row in _rows(path) if row['step'] <= last]
    with atomic_file(path) as partial:
        partial.write_text(''.join(json.dumps(row) + '\n' for row in kept))
    return kept[-1] if kept else {}


def _rows(path: StoragePath) -> list[dict[str, Any]]:
    """Return the rows of a file, without an unfinished last one.

    Raises:
      InputError: another line is damaged.
    """
    lines, rows = path.read_bytes().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line, dict[str, Any], str(path))
        except InputError:
            if number == len(lines):
                break
            row = None
        if row is None or type(row.get('step')) is not int:
            raise InputError(f'{path}: line {number} is damaged; delete that line, or the file, and run again.')
        rows.append(row)
    return rows


def _duration(seconds: float) -> str:
    """Return a duration such as 2 h 05 min."""
    minutes = round(seconds / 60)
    return f'{minutes // 60} h {minutes % 60:02d} min' if minutes >= 60 else f'{minutes} min'
