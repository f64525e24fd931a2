"""Logs of a run: JSON lines, TensorBoard, the console and a progress bar; from process 0 only."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
import tensorboardX
from tqdm import tqdm

from neodragon_jax.base.atomic import atomic_file
from train.runtime.program import EVALUATION

JSON_LINES = 'metrics.jsonl'
# Most screens show this many numbers on one line; the files have them all. Evaluations get a line of their own.
CONSOLE_METRICS = 8
# Steps that the host may be ahead of the devices: enough to keep them busy, few enough to bound memory.
STEPS_AHEAD = 2


class MetricsLog:
    """Appends the metrics of a run to its folder. A resumed run drops the lines that it is about to write again."""

    def __init__(self, folder: pathlib.Path, *, start: int, steps: int, progress: bool = True) -> None:
        """Open the logs.

        Args:
          folder: the run's folder; gets `metrics.jsonl` and `tensorboard/`.
          start: steps already done.
          steps: at which the run ends.
          progress: draw a bar when standard error is a terminal.
        """
        self._primary = jax.process_index() == 0
        if not self._primary:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JSON_LINES
        _keep_lines(path, start)
        self._file = path.open('a')
        self._board = tensorboardX.SummaryWriter(str(folder / 'tensorboard'), purge_step=start + 1)
        hide = not (progress and sys.stderr.isatty())
        self._bar = tqdm(total=steps, initial=start, disable=hide, unit='step', dynamic_ncols=True)

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self._primary:
            self._bar.update()

    def say(self, text: str) -> None:
        """Print a line on the console, above the progress bar."""
        if self._primary:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers under a step; one that is not finite becomes null."""
        if not self._primary:
            return
        plain = {name: float(value) for name, value in values.items()}
        row = {'step': step} | {name: value if math.isfinite(value) else None for name, value in plain.items()}
        self._file.write(json.dumps(row) + '\n')
        self._file.flush()
        for name, value in plain.items():
            self._board.add_scalar(name, value, step)
        for evaluated in (False, True):
            shown = [item for item in plain.items() if item[0].startswith(EVALUATION) == evaluated][:CONSOLE_METRICS]
            if shown:
                self.say('  '.join([f'step {step}', *(f'{name} {value:.4g}' for name, value in shown)]))

    def close(self) -> None:
        """Flush and close everything."""
        if self._primary:
            self._bar.close()
            self._board.close()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


class Window:
    """Metrics of the steps since the last log. They stay on the devices until they are read."""

    def __init__(self, counters: Sequence[str] = ()) -> None:
        """Begin a window; `counters` are read as they stand at its end, other metrics are averaged."""
        self._counters = counters
        self._rows: list[Mapping[str, jax.Array]] = []
        self._since = time.perf_counter()

    def add(self, metrics: Mapping[str, jax.Array]) -> None:
        """Keep the metrics of one step, and wait for an earlier one so that the host does not run away."""
        self._rows.append(metrics)
        if len(self._rows) > STEPS_AHEAD:
            jax.block_until_ready(self._rows[-1 - STEPS_AHEAD])

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside, such as an evaluation, out of the speed."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Return means over the window, its counters and its speed; begin a new window."""
        rows, now = jax.device_get(self._rows), time.perf_counter()
        counters = {name: float(rows[-1][name]) for name in self._counters}
        speed = {'steps_per_second': len(rows) / (now - self._since)}
        self._rows, self._since = [], now
        return _means(rows) | counters | speed


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of each metric over the rows that have it, without the values that are not finite."""
    means = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = np.asarray([row[name] for row in rows if name in row], np.float64)
        finite = values[np.isfinite(values)]
        means[name] = float(finite.mean()) if finite.size else math.nan
    return means


def read_metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Return the rows that a run has logged so far."""
    path = folder / JSON_LINES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _keep_lines(path: pathlib.Path, last: int) -> None:
    """Drop the rows after a step, and a row that a killed process left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)['step']
        except json.JSONDecodeError:
            continue
        if step <= last:
            kept.append(line + '\n')
    with atomic_file(path) as partial:
        partial.write_text(''.join(kept))
