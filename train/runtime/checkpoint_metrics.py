"""Metrics of a run's checkpoints: of the evaluation with which one was saved, and of one that was made up later."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping

import jax

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.bucket import StoragePath
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import parse_json
from train.runtime.damage import damaged

# File in the folder of a checkpoint whose state was evaluated after it was saved: it goes when the checkpoint goes.
LATE = 'late_metrics.json'


class CheckpointMetrics:
    """Metrics of the evaluations of a run's checkpoints; non-finite ones are left out. Equal on every process."""

    def __init__(self, folder: StoragePath) -> None:
        """Read the metrics of the checkpoints in a folder.

        Raises:
          InputError: a file is damaged.
        """
        self._folder = folder
        self._saved, self._late = recorded_metrics(folder), late_metrics(folder)

    def drop_other_than(self, steps: Iterable[int]) -> None:
        """Forget the metrics of checkpoints that are not complete."""
        self._saved = {step: self._saved.get(step, {}) for step in steps}

    def of(self, steps: Iterable[int] | None = None) -> dict[int, dict[str, float]]:
        """Return step -> all metrics of some checkpoints; None for all."""
        return {
            step: self._saved.get(step, {}) | self._late.get(step, {})
            for step in (self._saved if steps is None else steps)
        }

    def saved(self, step: int) -> dict[str, float]:
        """Return the metrics with which a checkpoint was saved."""
        return self._saved.get(step, {})

    def begin(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set the metrics of a checkpoint that is about to be saved with them."""
        self._saved[step] = _finite(metrics)
        self._late.pop(step, None)

    def late(self, step: int) -> dict[str, float] | None:
        """Return the metrics that `add_late` got, or None."""
        return self._late.get(step)

    def add_late(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of an evaluation of a checkpoint that exists; all processes call it."""
        self._late[step] = _finite(metrics)
        if jax.process_index() == 0:
            with atomic_file(self._folder / str(step) / LATE) as draft:
                draft.write_text(json.dumps(self._late[step], indent=2) + '\n')


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that JSON and a ranking can hold."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def recorded_metrics(folder: StoragePath) -> dict[int, dict[str, float]]:
    """Return step -> metrics with which the checkpoints of a folder were saved.

    Raises:
      InputError: a file is damaged.
    """
    found = {}
    for step, path in _files(folder, 'metrics/metrics'):
        try:
            found[step] = parse_json(path.read_bytes(), dict[str, float], str(path))
        except InputError as error:
            raise damaged(folder / str(step), str(error).removeprefix(f'{path}: ').rstrip('.')) from error
    return found


def late_metrics(folder: StoragePath) -> dict[int, dict[str, float]]:
    """Return step -> metrics of the evaluations that were made up; one whose file is damaged is made up again."""
    found = {}
    for step, path in _files(folder, LATE):
        try:
            found[step] = parse_json(path.read_bytes(), dict[str, float], str(path))
        except InputError:
            continue
    return found


def _files(folder: StoragePath, name: str) -> Iterator[tuple[int, StoragePath]]:
    """Yield (step, path) of a file of the checkpoints that have it."""
    for step in sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit()):
        path = folder / str(step) / name
        if path.exists():
            yield step, path
