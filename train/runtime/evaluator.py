"""Evaluations of a run: their schedule, and the folder of their samples."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable, Collection
from typing import Any

import jax

from neodragon_jax.base.atomic import atomic_folder
from neodragon_jax.base.bucket import StoragePath
from neodragon_jax.base.errors import InputError, did_you_mean
from train.runtime.processes import of_first_process
from train.runtime.program import EVALUATION, DivergedError, LoopConfig

# Folder of the samples inside the run's folder.
SAMPLES = 'samples'


class Evaluator:
    """Runner of a program's evaluations.

    Attributes:
      failure: error with which the run should end once everything is saved, or None.
    """

    def __init__(self, program: Any, config: LoopConfig) -> None:
        """Check that the program can evaluate if the settings ask for it.

        Raises:
          InputError: the settings ask for evaluations, and the program has none.
        """
        if config.evaluate_every and not hasattr(program, 'evaluate'):
            raise InputError(
                f'config.loop.evaluate_every is {config.evaluate_every}, but program {program.name} has no evaluation; '
                'set it to 0.'
            )
        self._program, self._config = program, config
        self.failure: DivergedError | InputError | None = None

    def due(self, done: int) -> bool:
        """Return whether an evaluation follows after `done` steps."""
        every = self._config.evaluate_every
        return bool(every) and (done % every == 0 or done == self._config.steps)

    def is_missing(self, done: int, passed: Collection[str] | None) -> bool:
        """Return whether the run must not go on from a checkpoint before its state is evaluated.

        Args:
          passed: names of the metrics of an evaluation that the state passed; None without one.
        """
        lacks_best = passed is not None and self._config.keep_best and self._config.best_metric not in passed
        return self.due(done) and (passed is None or bool(lacks_best))

    def run(
        self,
        state: Any,
        frozen: Any,
        done: int,
        show: Callable[[int, pathlib.Path], object] = lambda step, folder: None,
    ) -> dict[str, float]:
        """Evaluate a state; return the metrics of process 0 under their names in the logs.

        Args:
          show: called by process 0 with the step and the folder of the samples, on the local disk.
        """
        samples = self._config.folder / SAMPLES
        folder = samples / f'step_{done:06d}'
        if jax.process_index() == 0:
            for abandoned in samples.glob('.step_*'):  # left by a killed process
                shutil.rmtree(abandoned)
            with atomic_folder(folder, replace=True) as partial:
                numbers = self._numbers(state, frozen, partial)
                show(done, partial)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        else:
            numbers = self._numbers(state, frozen, folder.with_name(f'.not_of_process_{jax.process_index()}'))
        scores = {EVALUATION + name: value for name, value in of_first_process(numbers).items()}
        wanted = self._config.best_metric
        if self._config.keep_best and wanted not in scores:
            self.failure = InputError(
                f'config.loop.best_metric is {wanted!r}, no metric of {self._program.name}.'
                f'{did_you_mean(wanted, scores)}'
            )
        return scores

    def _numbers(self, state: Any, frozen: Any, folder: StoragePath) -> dict[str, float]:
        """Return the metrics of an evaluation as Python's numbers, also of one that ends the run."""
        try:
            metrics = self._program.evaluate(state, frozen, folder)
        except DivergedError as error:
            self.failure, metrics = error, error.metrics
        return {name: float(value) for name, value in metrics.items()}
