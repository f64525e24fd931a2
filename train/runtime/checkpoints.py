"""Checkpoints of a run: state, position in the data and randomness, and the facts that a resuming run must share.

A checkpoint has three items besides those of Orbax:

* `state`: parameters, optimizers, averages, step and counters, readable on any mesh and any number of processes.
* `place`: the position of the data iterator, the key of all randomness, the checksums of the arrays, and a hash of all
  this and the metadata.
* `metadata`: the metadata of the program, and the seed.

It is written in the background, and appears under its final name when complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.bucket import StoragePath, filesystem, is_bucket
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import as_json
from train.runtime.agreement import require_agreement
from train.runtime.checkpoint_metrics import CheckpointMetrics
from train.runtime.checksum import checksums
from train.runtime.damage import damaged, described, is_damage, raise_unless_damaged

# File that lists the best checkpoints and their metric, beside the checkpoints' folder.
BEST = 'best.json'
_SAME_LIST = (
    'some hosts see an old state of the folder, as a network disk may show it for a minute. Run the same command '
    'again; if this repeats, give all hosts the same folder.'
)


@dataclasses.dataclass(frozen=True)
class Keep:
    """Policy of the checkpoints to keep: the newest, and the best by a metric of their evaluation.

    Attributes:
      newest: number of newest checkpoints.
      best: number of best checkpoints; these may overlap with the newest.
      metric, mode: for instance 'eval/loss' and 'min'.
    """

    newest: int
    best: int = 0
    metric: str = ''
    mode: str = 'min'

    def ranked(self, metrics: Mapping[int, Mapping[str, float] | None]) -> dict[int, float]:
        """Return {step: metric} of the best checkpoints, best first; ties go to the older one.

        Args:
          metrics: step -> metrics of its evaluation. Steps without a finite value of the metric are left out.
        """
        values = {step: (given or {}).get(self.metric) for step, given in metrics.items()}
        scored = {step: value for step, value in values.items() if value is not None and math.isfinite(value)}
        sign = 1 if self.mode == 'min' else -1
        return dict(sorted(scored.items(), key=lambda item: (sign * item[1], item[0]))[: self.best])

    def kept(self, metrics: Mapping[int, Mapping[str, float] | None]) -> set[int]:
        """Return the steps of the checkpoints to keep.

        Args:
          metrics: step -> metrics of its evaluation, of all checkpoints.
        """
        return {*sorted(metrics)[-self.newest :], *self.ranked(metrics)}


class Checkpoints:
    """Checkpoints of a run, written in the background; each appears when complete.

    Attributes:
      metrics: those of the evaluations of their states.
    """

    def __init__(self, folder: StoragePath, *, keep: Keep, metadata: dict[str, Any]) -> None:
        """Open the folder.

        Args:
          keep: checkpoints to keep; `best.json` beside the folder lists the best.
          metadata: JSON that a checkpoint and a run that resumes from it must agree on.
        Raises:
          InputError: the newest checkpoint there belongs to another kind of run, or the processes see different ones.
        """
        if is_bucket(folder):
            filesystem()  # configures the libraries that Orbax uses
        self._folder, self._keep = folder if is_bucket(folder) else folder.absolute(), keep
        self._metadata = as_json(metadata)
        self.metrics = CheckpointMetrics(self._folder)  # Orbax reads the same files, and fails with a traceback
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,  # pyright: ignore[reportArgumentType]
            # Remove the temporary folders of killed processes.
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=_handlers())
        self.metrics.drop_other_than(self._manager.all_steps())
        require_agreement({'list of checkpoints': self.metrics.of()}, _SAME_LIST)
        latest = self.latest()
        if latest is not None:
            self._check(latest)
        self._record_best()

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def best(self) -> dict[str, Any] | None:
        """Return step, metric and mode of the best checkpoint, as JSON; None if no evaluation has the metric."""
        best = [
            {'step': step, self._keep.metric: value} for step, value in self._keep.ranked(self.metrics.of()).items()
        ]
        return best[0] | {'mode': self._keep.mode} if best else None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return for each checkpoint whether to keep it (Orbax's interface)."""
        del context
        kept = self._keep.kept(self.metrics.of([info.step for info in checkpoints]))
        return [info.step in kept for info in checkpoints]

    def _check(self, step: int) -> None:
        """Raise InputError if a checkpoint's metadata cannot be read, or differ from this run's."""
        try:
            recorded = self._records(step)['metadata']
        except Exception as error:
            raise_unless_damaged(self._folder / str(step), error)
            raise damaged(self._folder / str(step), type(error).__name__) from error
        for name in sorted(recorded.keys() | self._metadata.keys()):
            old, new = recorded.get(name), self._metadata.get(name)
            if old != new:
                raise InputError(
                    f'{self._folder}: its checkpoint has {name} = {json.dumps(old)}, this run {json.dumps(new)}; '
                    'choose another workdir, or the recorded setting.'
                )

    def _records(self, step: int, manager: ocp.CheckpointManager | None = None, **more: Any) -> Any:
        """Return the items of a checkpoint: `place`, `metadata`, and those in `more`, with their arguments.

        Args:
          manager: reads the checkpoint; None takes that of all processes.
        Raises:
          InputError: it has no checksums.
          Exception: of many kinds, if the checkpoint is damaged.
        """
        items = ocp.args.Composite(place=ocp.args.JsonRestore(), metadata=ocp.args.JsonRestore(), **more)
        found = (manager or self._manager).restore(step, args=items)
        stored = found['place']
        if isinstance(stored, dict) and 'sha256' not in stored:
            raise InputError(
                f'{self._folder / str(step)}: the checkpoint has no checksums, so an earlier version of this program '
                'wrote it. Nothing is lost: continue with that version, or choose another workdir.'
            )
        if stored['sha256'] != _digest(stored['place'], stored['state'], found['metadata'], self.metrics.saved(step)):
            raise ValueError('its hash is another')
        return dict(found) | {'place': stored['place'], 'checksums': stored['state']}

    def save(self, step: int, state: Any, place: dict[str, Any]) -> None:
        """Save in the background, unless this step is saved already. The state may be donated after the call.

        Args:
          place: JSON, equal on every process.
        """
        if self.latest() == step:
            return
        # Wait for the previous checkpoint, as Orbax would: only then is it known to be complete.
        self.wait()
        self.metrics.begin(step)
        sums = checksums(state)
        digest = _digest(place, sums, self._metadata, self.metrics.saved(step))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            place=ocp.args.JsonSave({'place': place, 'state': sums, 'sha256': digest}),
            metadata=ocp.args.JsonSave(self._metadata),
        )
        self._manager.save(step, args=items, force=True)

    def add_metrics(self, step: int, metrics: Mapping[str, float], *, passed: bool = True) -> None:
        """Record the evaluation of a state whose checkpoint is written; all processes call it."""
        self.metrics.add(step, metrics, passed=passed)
        self._record_best()

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Return the newest state, in the shardings of `abstract_state`, and its place.

        Raises:
          InputError: the newest checkpoint is damaged, and the message names the newest undamaged one; or it cannot be
            read now.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        try:
            return self._restore(steps[0], abstract_state)
        except Exception as error:
            raise_unless_damaged(self._folder / str(steps[0]), error)
            reason = described(error)
            good = self._newest_good(steps[1:], abstract_state)
        bad = [self._folder / str(step) for step in steps if good is None or step > good]
        then = f'to continue from step {good}' if good is not None else 'to start again: no other checkpoint is good'
        raise InputError(f'{bad[0]}: the checkpoint is damaged ({reason}); delete {", ".join(map(str, bad))} {then}.')

    def restore_state(self, step: int, abstract_state: Any) -> Any:
        """Return the state of one checkpoint; raise InputError as `restore` does."""
        try:
            return self._restore(step, abstract_state)[0]
        except Exception as error:
            raise_unless_damaged(self._folder / str(step), error)
            raise damaged(self._folder / str(step), type(error).__name__) from error

    def _restore(
        self, step: int, abstract_state: Any, manager: ocp.CheckpointManager | None = None
    ) -> tuple[Any, dict[str, Any]]:
        restored = self._records(step, manager, state=ocp.args.StandardRestore(abstract_state))
        sums = checksums(restored['state'])
        wrong = sorted(name for name, value in restored['checksums'].items() if sums.get(name) != value)
        if wrong or len(sums) != len(restored['checksums']):
            raise ValueError(f'array {wrong[0] if wrong else "names"} has another checksum')
        return restored['state'], restored['place']

    def _newest_good(self, steps: Sequence[int], abstract_state: Any) -> int | None:
        """Return the first of these steps whose checkpoint is not known to be damaged, or None.

        This process searches alone, in the memory of its host: the others may have succeeded and do not take part.
        """
        number = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(number, {number}, f'search_{number}')
        options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
        on_host = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), abstract_state)
        with ocp.CheckpointManager(self._folder, options=options, item_handlers=_handlers(alone)) as manager:
            for step in steps:
                try:
                    self._restore(step, on_host, manager)
                except Exception as error:
                    if is_damage(error):
                        continue
                return step
        return None

    def preempted(self, step: int) -> bool:
        """Return whether the processes have agreed to stop because one is preempted; all must call it every step."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Wait until everything is written, then record the best checkpoints."""
        self._manager.wait_until_finished()
        self._record_best()

    def _record_best(self) -> None:
        """Write `best.json`."""
        if not self._keep.best or jax.process_index() != 0:
            return
        there = self.metrics.of(self._manager.all_steps())
        best = [{'step': step, self._keep.metric: value} for step, value in self._keep.ranked(there).items()]
        with atomic_file(self._folder.parent / BEST) as path:
            path.write_text(json.dumps({'mode': self._keep.mode, 'best_first': best}, indent=2) + '\n')

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        # Closing waits for all processes. After an error of this process the others never reach it; see `exit_process`.
        alone = kind is not None and issubclass(kind, Exception) and jax.process_count() > 1
        if not alone:
            self._manager.close()


def _handlers(processes: ocp.options.MultiprocessingOptions | None = None) -> dict[str, Any]:
    """Return Orbax's handler of each item, for `processes`; None for all."""
    processes = processes or ocp.options.MultiprocessingOptions()
    return {
        'state': ocp.StandardCheckpointHandler(multiprocessing_options=processes),
        'place': ocp.JsonCheckpointHandler(multiprocessing_options=processes),
        'metadata': ocp.JsonCheckpointHandler(multiprocessing_options=processes),
    }


def _digest(*values: Any) -> str:
    """Return a hash of JSON values."""
    return hashlib.sha256(json.dumps(as_json(values), sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or the first Ctrl-C sets; a second Ctrl-C interrupts at once.

    With several processes, JAX's coordination service handles SIGTERM, so that all stop at the same step. In that case
    the event stays unset, and Ctrl-C is converted to SIGTERM.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    alone = jax.process_count() == 1

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print('stopping after this step; press Ctrl-C again to stop at once without saving.', file=sys.stderr)
        if alone:
            stop.set()
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers: dict[int, Any] = {signal.SIGINT: interrupt}
    if alone:
        handlers[signal.SIGTERM] = lambda *_: stop.set()
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
