"""The training loop, common to all programs.

A program defines an objective: the initial state and the update of one step (`train.runtime.program`). The loop
provides the mesh, compiled steps, data in a fixed order, checkpoints, logs, evaluations, traces, a guard against
non-finite numbers, and a clean stop. `jit_step` is the step that `run` executes and that an ahead-of-time compilation
lowers.

A step is a function of the seed, the step number and the state, so a run that is killed and restarted has the same
result, bit for bit, as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from neodragon_jax.base.bucket import check_bucket, is_bucket
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.folder_lock import folder_lock
from neodragon_jax.base.processes import start_processes
from neodragon_jax.base.shared_folder import require_shared
from train.data import Source
from train.data.sources import identity
from train.runtime import frozen_weights
from train.runtime.agreement import code_version, require_agreement
from train.runtime.checkpoints import Checkpoints, Keep, stop_on_signals
from train.runtime.compiled_steps import CompiledSteps, use_compile_cache
from train.runtime.evaluator import Evaluator
from train.runtime.goodput import CHECKPOINT, COMPILE, DATA, EVALUATION, START, Goodput
from train.runtime.loader import Loader
from train.runtime.metrics import MetricsLog, Window
from train.runtime.optimizer import optimizer_kinds
from train.runtime.plan import plan
from train.runtime.processes import wait_for_processes
from train.runtime.profiler import Profiler
from train.runtime.program import DivergedError, EvaluatedProgram, LoopConfig, Metrics, Program, State
from train.runtime.results import RESULT, check_no_result, restore_best, write_if_best, write_result
from train.runtime.sharding import make_mesh, put
from train.runtime.step import (
    COUNTERS,
    Arguments,
    Carry,
    abstract_arguments,
    batch_sharding_of,
    guarded_step,
    initial,
    jit_step,
    shardings_of,
)
from train.runtime.watch import Watch

# Interface for programs, their tests and ahead-of-time compilation.
__all__ = [
    'Arguments',
    'Carry',
    'DivergedError',
    'EvaluatedProgram',
    'LoopConfig',
    'Metrics',
    'Program',
    'State',
    'abstract_arguments',
    'batch_sharding_of',
    'guarded_step',
    'jit_step',
    'plan',
    'run',
]

# Names inside the run's folder.
CHECKPOINTS, PROFILE = 'checkpoints', 'profile'


def run(program: Program, source: Source, config: LoopConfig) -> Any:
    """Train to `config.steps`, from the newest checkpoint in `config.workdir` if there is one.

    At the end `program.finish` writes to `workdir/result`. On SIGTERM, on the first Ctrl-C, or before a preemption of
    the pod, the run saves a checkpoint and exits with status 0; the same command resumes from it. A run that its
    evaluation ended, or that diverged in its last steps, ends with the same error when it is repeated.

    Returns:
      The program's state after the last step, sharded.
    Raises:
      InputError: the configuration does not fit the devices, the data, the program or the checkpoint, or the processes
        do not agree on it.
      DivergedError: `config.max_skips` steps in a row were not finite, or an evaluation ended the run.
    """
    _prepare(config)
    mesh, goodput, metadata = make_mesh(config.mesh), Goodput(), _metadata(program, source, config)
    evaluator = Evaluator(program, config)
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(Watch(config.folder, lambda: goodput.activity, print))
        with goodput.spending(START):
            host_frozen = program.frozen()
            abstract = abstract_arguments(program, host_frozen, source, config, mesh)
            _agree(config, metadata)
            parts = _open(stack, program, source, config, mesh, metadata)
            frozen = put(host_frozen, shardings_of(abstract.frozen))
            del host_frozen
            weights = frozen_weights.identities(frozen)
            carry, root_key, place = _begin(program, config, abstract, frozen, weights, parts)
        start = parts.checkpoints.latest() or 0
        # A checkpoint of an earlier version has the names in its place.
        if start and evaluator.is_missing(start, parts.checkpoints.metrics.passed(start, place.get('passed'))):
            parts.log.print_line(f'evaluating the checkpoint of step {start}: no evaluation that it passed is recorded')
            with goodput.spending(EVALUATION):
                _evaluate(evaluator, program, carry.state, frozen, start, parts, config)
        compiled, window = CompiledSteps(program, abstract, parts.log.print_line), Window(goodput, mesh, COUNTERS)

        for done in range(start + 1, config.steps + 1):
            watch.at(done)
            with goodput.spending(COMPILE):
                step = compiled.step(program.variant(done - 1))
            with goodput.spending(DATA):
                batch = next(parts.loader)
            parts.profiler.before(done)
            with jax.transfer_guard('disallow'):
                carry, metrics = step.run(carry, frozen, batch, root_key)
            parts.profiler.after(done, metrics)
            window.add(metrics, step.flops)
            parts.log.advance(done)
            last = done == config.steps
            values = window.read() if last or done % config.log_every == 0 else {}
            if values and values['skipped_in_a_row'] >= config.max_skips:
                _end_diverged(parts, carry, _place(parts.loader, root_key, weights), done, values, config)
            if values:
                parts.log.write(done, values)
            # Called every step: the processes of a pod agree on the step at which they stop.
            stopped = parts.checkpoints.preempted(done) or parts.stop.is_set()
            # Saved before it is evaluated, because an evaluation may outlast the notice of a preemption; a run that was
            # ended before or during its evaluation makes it up.
            if last or stopped or evaluator.due(done) or done % config.checkpoint_every == 0:
                with goodput.spending(CHECKPOINT):
                    parts.log.sync()
                    parts.checkpoints.save(done, carry, _place(parts.loader, root_key, weights))
            if evaluator.due(done) and not stopped:
                with goodput.spending(EVALUATION):
                    _evaluate(evaluator, program, carry.state, frozen, done, parts, config)
            if stopped and (not last or evaluator.due(done)):
                _stop(parts, program, done)
        parts.checkpoints.wait()
        write_result(program, carry.state, config.folder / RESULT)
        parts.log.print_line(f'{program.name}: {goodput.describe()}')
    return carry.state


def _prepare(config: LoopConfig) -> None:
    """Join the other processes, enable the compile cache, and check that a bucket can be written.

    Raises:
      InputError: the processes cannot find each other, or the bucket does not allow it.
    """
    start_processes(config.distributed, config.start_timeout_s)
    if is_bucket(config.folder):
        check_bucket(config.folder, 'config.workdir', write=True)
    use_compile_cache(config.compile_cache, config.folder)


def _agree(config: LoopConfig, metadata: dict[str, Any]) -> None:
    """Wait for all processes, and raise InputError unless they agree on the run."""
    wait_for_processes()
    require_agreement({'settings': _shared(config), 'data or objective': metadata, 'code': code_version()})


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Resources of a run, closed at its end."""

    checkpoints: Checkpoints
    log: MetricsLog
    profiler: Profiler
    stop: threading.Event
    loader: Loader


def _open(
    stack: contextlib.ExitStack,
    program: Program,
    source: Source,
    config: LoopConfig,
    mesh: jax.sharding.Mesh,
    metadata: dict[str, Any],
) -> _Parts:
    """Open checkpoints, logs and data.

    Raises:
      InputError: another process trains in this folder, the hosts do not share it, it has a result without checkpoints,
        or the checkpoints belong to another run or are beyond the last step.
    """
    workdir = config.folder
    require_shared(workdir, 'config.workdir')
    if jax.process_index() == 0:
        stack.enter_context(folder_lock(workdir))
    wait_for_processes()  # until then, the run before may save its last checkpoint
    keep = Keep(config.keep, config.keep_best, config.best_metric, config.best_mode)
    checkpoints = stack.enter_context(Checkpoints(workdir / CHECKPOINTS, keep=keep, metadata=metadata))
    start = checkpoints.latest() or 0
    if not start:
        check_no_result(workdir)
    if start > config.steps:
        raise InputError(f'{workdir} is at step {start} already, beyond config.loop.steps = {config.steps}; raise it.')
    shown = getattr(program, 'shown', ())
    log = MetricsLog(workdir, start=start, steps=config.steps, progress=config.progress, shown=shown)
    stack.enter_context(log)
    return _Parts(
        checkpoints=checkpoints,
        log=log,
        profiler=stack.enter_context(Profiler(workdir / PROFILE, config.profile_steps, log.print_line)),
        stop=stack.enter_context(stop_on_signals()),
        loader=stack.enter_context(contextlib.closing(_loader(source, config, mesh))),
    )


def _evaluate(
    evaluator: Evaluator, program: Program, state: Any, frozen: Any, done: int, parts: _Parts, config: LoopConfig
) -> None:
    """Evaluate the state of a checkpoint; record the metrics, and the result if they are the best.

    Raises:
      DivergedError, InputError: the evaluation ends the run.
    """
    scores = evaluator.run(state, frozen, done, parts.log.show)
    parts.checkpoints.wait()  # the metrics go into its folder
    parts.log.write(done, scores)
    parts.checkpoints.add_metrics(done, scores, passed=evaluator.failure is None)
    write_if_best(program, state, done, parts.checkpoints, config.folder)
    if evaluator.failure:
        raise evaluator.failure


def _stop(parts: _Parts, program: Program, done: int) -> None:
    """Wait until the checkpoint is written, then end the process with status 0."""
    parts.checkpoints.wait()
    parts.log.print_line(f'{program.name}: stopped and saved at step {done}; run the same command to continue.')
    sys.exit(0)


def _end_diverged(
    parts: _Parts, carry: Carry, place: dict[str, Any], done: int, values: Mapping[str, float], config: LoopConfig
) -> None:
    """Save the state before the non-finite steps, and raise DivergedError."""
    parts.log.write(done, values)
    parts.log.sync()
    skipped = int(values['skipped_in_a_row'])
    # A run without steps left would end well when it is repeated.
    place |= {'diverged_at_end': skipped if done == config.steps else 0}
    parts.checkpoints.save(done, _without_skips(carry), place)
    parts.checkpoints.wait()
    raise _diverged(done, skipped, config)


def _loader(source: Source, config: LoopConfig, mesh: jax.sharding.Mesh) -> Loader:
    """Return the batches of a run, from the first."""
    return Loader(
        source,
        batch_sharding_of(config, mesh),
        batch_size=config.batch_size,
        updates=config.updates,
        seed=config.seed,
    )


def _begin(
    program: Program, config: LoopConfig, abstract: Arguments, frozen: Any, weights: dict[str, Any], parts: _Parts
) -> tuple[Carry, PRNGKeyArray, dict[str, Any]]:
    """Return the initial or restored carry, the key of all steps, and the checkpoint's place; set the loader to it.

    Raises:
      DivergedError: the checkpoint is of a run that diverged in its last steps, and no step is added.
      InputError: the checkpoint was trained with other frozen weights.
    """

    def keys(seed: jax.Array) -> tuple[PRNGKeyArray, PRNGKeyArray]:
        init_key, root_key = jax.random.split(jax.random.key(seed))
        return init_key, root_key

    sharding = abstract.root_key.sharding
    init_key, root_key = jax.jit(keys, out_shardings=sharding)(np.uint32(config.seed))
    if parts.checkpoints.latest() is None:
        begin = functools.partial(initial, program)
        compiled = jax.jit(begin, out_shardings=shardings_of(abstract.carry)).lower(init_key, frozen).compile()
        wait_for_processes()
        return compiled(init_key, frozen), root_key, {}
    restore_best(program, abstract.carry, parts.checkpoints, config.folder)
    carry, place = parts.checkpoints.restore(abstract.carry)
    # Checkpoints of earlier versions do not record the weights.
    frozen_weights.require_same(place.get('frozen', weights), weights, config.workdir)
    if parts.checkpoints.latest() == config.steps and place.get('diverged_at_end'):
        raise _diverged(config.steps, place['diverged_at_end'], config)
    parts.log.print_line(f'{program.name}: continuing from the checkpoint of step {parts.checkpoints.latest()}')
    parts.loader.set_state(place['data'])
    # Use the stored key: another version of JAX may derive a different key from the seed.
    stored = put(np.asarray(place['key'], np.uint32), sharding)
    return carry, jax.jit(jax.random.wrap_key_data, out_shardings=sharding)(stored), place


def _place(loader: Loader, root_key: PRNGKeyArray, weights: dict[str, Any]) -> dict[str, Any]:
    """Return as JSON the position in the data, the key of all randomness, and the identities of the frozen weights."""
    key = np.asarray(jax.random.key_data(root_key)).tolist()
    return {'data': loader.get_state(), 'key': key, 'frozen': weights}


def _without_skips(carry: Carry) -> Carry:
    """Return the carry with its counter of consecutive skipped steps at zero, for a resumed run."""
    zero = put(np.int32(0), carry.skipped_in_a_row.sharding)
    return carry.replace(skipped_in_a_row=zero)  # pyright: ignore[reportAttributeAccessIssue]


def _shared(config: LoopConfig) -> dict[str, Any]:
    """Return the settings that all processes must share; the others are specific to a host."""
    local = ('workdir', 'progress', 'profile_steps', 'compile_cache', 'distributed', 'start_timeout_s')
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in local}


def _metadata(program: Program, source: Source, config: LoopConfig) -> dict[str, Any]:
    """Return the facts that a checkpoint and a resuming run must share; the mesh and the number of steps may change."""
    order = {'seed': config.seed, 'batch_size': config.batch_size, 'updates': config.updates}
    order |= {'number of samples': len(source), 'content of the samples': identity(source)}
    return program.metadata() | {'program': program.name, 'optimizers': optimizer_kinds(program)} | order


def _diverged(done: int, skipped: int, config: LoopConfig) -> DivergedError:
    """Return the error of a run that skips all its steps."""
    then = 'run again' if done < config.steps else 'run again with a larger config.loop.steps: none is left'
    return DivergedError(
        f'step {done}: the last {skipped} steps had a loss or gradient that is not finite; the state before them is '
        f'saved in {config.workdir}. Lower the learning rate or look at the data, then {then}.'
    )
