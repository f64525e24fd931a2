"""Checkpoints of a run: its state, its place in the data, and what it must agree on to go on."""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
import threading
from collections.abc import Iterator
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from neodragon_jax.errors import InputError


class Checkpoints:
    """The newest checkpoints of a run, written in the background; each appears when it is complete."""

    def __init__(self, folder: pathlib.Path, *, keep: int, metadata: dict[str, Any]) -> None:
        """Open the folder.

        Args:
          keep: newest checkpoints to keep.
          metadata: JSON that a checkpoint and a run that resumes from it must agree on.
        Raises:
          InputError: the newest checkpoint there belongs to another kind of run.
        """
        self._folder = folder.absolute()
        self._metadata = json.loads(json.dumps(metadata))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        handlers = {'state': ocp.StandardCheckpointHandler(), 'data': ocp.JsonCheckpointHandler()}
        handlers['metadata'] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)
        latest = self.latest()
        if latest is not None:
            self._check(latest)

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def _check(self, step: int) -> None:
        """Raise InputError if a checkpoint's metadata differ from this run's."""
        items = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        recorded = self._manager.restore(step, args=items)['metadata']
        for name in sorted(recorded.keys() | self._metadata.keys()):
            old, new = recorded.get(name), self._metadata.get(name)
            if old != new:
                raise InputError(
                    f'{self._folder}: its checkpoint has {name} = {json.dumps(old)}, this run {json.dumps(new)}; '
                    'choose another workdir, or the recorded setting.'
                )

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Save in the background, unless this step is saved already. The state may be donated once this returns."""
        if self.latest() == step:
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            metadata=ocp.args.JsonSave(self._metadata),
        )
        self._manager.save(step, args=items, force=True)

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """Return the newest state, in the shardings of `abstract_state`, and its place in the data."""
        step = self.latest()
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored['state'], restored['data']

    def preempted(self, step: int) -> bool:
        """Return whether the processes of this run have agreed that one of them must stop; all call it every step."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Return when everything is written."""
        self._manager.wait_until_finished()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._manager.close()


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets, instead of ending the process.

    With several processes JAX's coordination service watches for the signal, so that all stop at the same step; then
    the event stays unset.
    """
    stop = threading.Event()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
