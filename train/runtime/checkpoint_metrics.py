"""Metrics of a run's checkpoints: an evaluation follows the checkpoint of the state that it evaluates."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping

import jax

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.bucket import StoragePath
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import parse_json
from train.runtime.damage import damaged

# File in the folder of a checkpoint: it goes when the checkpoint goes.
EVALUATION = 'evaluation.json'


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """The evaluation of a checkpoint's state.

    Attributes:
      passed: whether the run may go on from the state.
      metrics: None for a number that is not finite.
    """

    passed: bool
    metrics: dict[str, float | None]


class CheckpointMetrics:
    """Metrics of the evaluations of a run's checkpoints. Equal on every process."""

    def __init__(self, folder: StoragePath) -> None:
        """Read the metrics of the checkpoints in a folder.

        Raises:
          InputError: a file is damaged.
        """
        self._folder = folder
        self._saved, self._evaluated = recorded_metrics(folder), evaluations(folder)

    def drop_other_than(self, steps: Iterable[int]) -> None:
        """Forget the metrics of checkpoints that are not complete."""
        self._saved = {step: self._saved.get(step, {}) for step in steps}

    def of(self, steps: Iterable[int] | None = None) -> dict[int, dict[str, float]]:
        """Return step -> the finite metrics of some checkpoints; None for all."""
        return {
            step: self._saved.get(step, {}) | self._finite(step) for step in (self._saved if steps is None else steps)
        }

    def saved(self, step: int) -> dict[str, float]:
        """Return the metrics with which a checkpoint of an earlier version was saved; {} for others."""
        return self._saved.get(step, {})

    def begin(self, step: int) -> None:
        """Note a checkpoint that is about to be saved, without metrics."""
        self._saved[step] = {}
        self._evaluated.pop(step, None)

    def passed(self, step: int, otherwise: Collection[str] | None) -> Collection[str] | None:
        """Return the names of the metrics of an evaluation that a checkpoint passed; None if it failed.

        Args:
          otherwise: what to return of a checkpoint without an evaluation.
        """
        found = self._evaluated.get(step)
        return otherwise if found is None else found.metrics if found.passed else None

    def add(self, step: int, metrics: Mapping[str, float], *, passed: bool) -> None:
        """Record the evaluation of a checkpoint that exists; all processes call it."""
        plain = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._evaluated[step] = Evaluated(passed, plain)
        if jax.process_index() == 0:
            with atomic_file(self._folder / str(step) / EVALUATION) as draft:
                draft.write_text(json.dumps(dataclasses.asdict(self._evaluated[step]), indent=2) + '\n')

    def _finite(self, step: int) -> dict[str, float]:
        """Return the metrics of a checkpoint's evaluation that can be ranked."""
        found = self._evaluated.get(step)
        return {name: value for name, value in (found.metrics if found else {}).items() if value is not None}


def recorded_metrics(folder: StoragePath) -> dict[int, dict[str, float]]:
    """Return step -> metrics with which an earlier version saved the checkpoints of a folder.

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


def evaluations(folder: StoragePath) -> dict[int, Evaluated]:
    """Return step -> evaluation; one whose file is damaged is made up when its run goes on."""
    found = {}
    for step, path in _files(folder, EVALUATION):
        try:
            found[step] = parse_json(path.read_bytes(), Evaluated, str(path))
        except InputError:
            continue
    return found


def _files(folder: StoragePath, name: str) -> Iterator[tuple[int, StoragePath]]:
    """Yield (step, path) of a file of the checkpoints that have it."""
    for step in sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit()):
        path = folder / str(step) / name
        if path.exists():
            yield step, path
