"""The training loop: everything that a program does not own.

A program is an objective: how its state begins and what one step does to it (`train.runtime.program`). The loop gives
it a mesh, compiled steps, data in a fixed order, checkpoints, logs, evaluations, traces, a guard against numbers that
are not finite, and a clean stop. `run` reads from top to bottom; `jit_step` is the step that it runs and that an
ahead-of-time compilation lowers.

What a step computes depends on the seed, the step and the state only, so a run that is killed and started again ends
bit for bit where an unbroken one does.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import shutil
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import PRNGKeyArray

from neodragon_jax.base.atomic import atomic_folder
from neodragon_jax.base.errors import InputError, did_you_mean
from neodragon_jax.base.processes import start_processes
from train.data import Source
from train.runtime.checkpoints import Checkpoints, Keep, stop_on_sigterm
from train.runtime.loader import Loader
from train.runtime.metrics import MetricsLog, Window
from train.runtime.plan import plan
from train.runtime.processes import of_first_process, wait_for_processes
from train.runtime.profiler import Profiler
from train.runtime.program import EVALUATION, DivergedError, EvaluatedProgram, LoopConfig, Metrics, Program, State
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

# All that a program, its tests and an ahead-of-time compilation need is here.
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

# In the run's folder.
CHECKPOINTS, RESULT, SAMPLES, PROFILE = 'checkpoints', 'result', 'samples', 'profile'


def run(program: Program, source: Source, config: LoopConfig) -> Any:
    """Train to `config.steps`, from the newest checkpoint in `config.workdir` if there is one.

    At the end `program.finish` writes to `workdir/result`. On SIGTERM, or when a pod is about to be preempted, the run
    saves a checkpoint and exits with status 0; the same command goes on from there.

    Returns:
      The program's state after the last step, sharded.
    Raises:
      InputError: the configuration does not fit the devices, the data, the program or the checkpoint.
      DivergedError: `config.max_skips` steps in a row were not finite.
    """
    start_processes(config.distributed)
    use_compile_cache(config.compile_cache)
    mesh, workdir, host_frozen = make_mesh(config.mesh), pathlib.Path(config.workdir), program.frozen()
    abstract = abstract_arguments(program, host_frozen, source, config, mesh)
    evaluation = _Evaluation(program, config)
    wait_for_processes()
    with contextlib.ExitStack() as stack:
        keep = Keep(config.keep, config.keep_best, config.best_metric, config.best_mode)
        metadata = _metadata(program, source, config)
        checkpoints = stack.enter_context(Checkpoints(workdir / CHECKPOINTS, keep=keep, metadata=metadata))
        start = checkpoints.latest() or 0
        if start > config.steps:
            raise InputError(f'{workdir} is at step {start} already, beyond steps = {config.steps}; raise steps.')
        log = stack.enter_context(MetricsLog(workdir, start=start, steps=config.steps, progress=config.progress))
        profiler = stack.enter_context(Profiler(workdir / PROFILE, config.profile_steps, log.say))
        stop = stack.enter_context(stop_on_sigterm())
        loader = stack.enter_context(contextlib.closing(_loader(source, config, mesh)))
        frozen = put(host_frozen, shardings_of(abstract.frozen))
        del host_frozen
        carry, root_key = _begin(program, config, abstract, frozen, checkpoints, loader)
        if start:
            log.say(f'{program.name}: going on from the checkpoint of step {start}')
        compiled, window = _CompiledSteps(program, abstract, log), Window(COUNTERS)

        for done in range(start + 1, config.steps + 1):
            step, batch = compiled.step(program.variant(done - 1)), next(loader)
            profiler.before(done)
            with jax.transfer_guard('disallow'):
                carry, metrics = step(carry, frozen, batch, root_key)
            profiler.after(done, metrics)
            window.add(metrics)
            log.advance()
            last = done == config.steps
            values = window.read() if last or done % config.log_every == 0 else {}
            if values and values['skipped_in_a_row'] >= config.max_skips:
                log.write(done, values)
                checkpoints.save(done, _forgive(carry), _place(loader, root_key), {})
                checkpoints.wait()
                raise DivergedError(_divergence(done, values, workdir))
            with window.paused():
                scores = evaluation.run(carry.state, frozen, done) if evaluation.due(done) else {}
            if values or scores:
                log.write(done, values | scores)
            # Asked every step: the processes of a pod agree on the step at which they stop.
            stopped = checkpoints.preempted(done) or stop.is_set()
            if last or stopped or done % config.checkpoint_every == 0 or (scores and config.keep_best):
                checkpoints.save(done, carry, _place(loader, root_key), scores)
            if stopped and not last:
                checkpoints.wait()
                log.say(f'{program.name}: stopped and saved at step {done}; run the same command to go on.')
                sys.exit(0)
        checkpoints.wait()
        program.finish(carry.state, workdir / RESULT)
    return carry.state


def use_compile_cache(folder: str) -> None:
    """Keep compiled programs in a folder, from now on and for all of this process; '' changes nothing."""
    if folder and jax.config.values['jax_compilation_cache_dir'] != folder:
        jax.config.update('jax_compilation_cache_dir', folder)
        compilation_cache.reset_cache()  # JAX opens its cache once, at the first compilation


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
    program: Program, config: LoopConfig, abstract: Arguments, frozen: Any, checkpoints: Checkpoints, loader: Loader
) -> tuple[Carry, PRNGKeyArray]:
    """Return the first or the restored carry, and the key of all steps; moves the loader to its place."""

    def keys(seed: jax.Array) -> tuple[PRNGKeyArray, PRNGKeyArray]:
        init_key, root_key = jax.random.split(jax.random.key(seed))
        return init_key, root_key

    sharding = abstract.root_key.sharding
    init_key, root_key = jax.jit(keys, out_shardings=sharding)(np.uint32(config.seed))
    if checkpoints.latest() is None:
        begin = functools.partial(initial, program)
        compiled = jax.jit(begin, out_shardings=shardings_of(abstract.carry)).lower(init_key, frozen).compile()
        wait_for_processes()
        return compiled(init_key, frozen), root_key
    carry, place = checkpoints.restore(abstract.carry)
    loader.set_state(place['data'])
    # The run's own key, were this version of JAX to make another one of its seed.
    stored = put(np.asarray(place['key'], np.uint32), sharding)
    return carry, jax.jit(jax.random.wrap_key_data, out_shardings=sharding)(stored)


def _place(loader: Loader, root_key: PRNGKeyArray) -> dict[str, Any]:
    """Return, as JSON, where a run is in its data, and the key of all its randomness."""
    return {'data': loader.get_state(), 'key': np.asarray(jax.random.key_data(root_key)).tolist()}


class _CompiledSteps:
    """The steps of a program, each compiled when its variant first comes up, by all processes at that time."""

    def __init__(self, program: Program, abstract: Arguments, log: MetricsLog) -> None:
        self._program, self._abstract, self._log = program, abstract, log
        self._steps: dict[Hashable, Callable[..., tuple[Carry, Metrics]]] = {}

    def step(self, variant: Hashable) -> Callable[..., tuple[Carry, Metrics]]:
        """Return the step of a variant."""
        if variant not in self._steps:
            self._log.say(f'{self._program.name}: compiling the step of variant {variant!r}')
            lowered = jit_step(self._program, variant, self._abstract).lower(*self._abstract)
            self._steps[variant] = lowered.compile()
            wait_for_processes()
        return self._steps[variant]


class _Evaluation:
    """The evaluations of a run: when they are due, and where their samples go."""

    def __init__(self, program: Any, config: LoopConfig) -> None:
        if config.evaluate_every and not hasattr(program, 'evaluate'):
            raise InputError(
                f'evaluate_every is {config.evaluate_every}, but program {program.name} has no evaluation; set it to 0.'
            )
        self._program, self._config = program, config
        self._folder = pathlib.Path(config.workdir) / SAMPLES

    def due(self, done: int) -> bool:
        """Return whether a step is followed by an evaluation."""
        every = self._config.evaluate_every
        return bool(every) and (done % every == 0 or done == self._config.steps)

    def run(self, state: Any, frozen: Any, done: int) -> dict[str, float]:
        """Evaluate a state; return process 0's numbers by the names that they have in the logs.

        Raises:
          InputError: they lack the metric by which the best checkpoints are kept.
        """
        folder = self._folder / f'step_{done:06d}'
        if jax.process_index() == 0:
            for abandoned in self._folder.glob('.step_*'):  # by a killed process
                shutil.rmtree(abandoned)
            with atomic_folder(folder, replace=True) as partial:
                numbers = self._program.evaluate(state, frozen, partial)
            if not any(folder.iterdir()):
                folder.rmdir()
        else:
            numbers = self._program.evaluate(state, frozen, folder.with_name(f'.not_of_process_{jax.process_index()}'))
        scores = {EVALUATION + name: float(value) for name, value in of_first_process(numbers).items()}
        wanted = self._config.best_metric
        if self._config.keep_best and wanted not in scores:
            raise InputError(
                f'best_metric is {wanted!r}, no metric of {self._program.name}.{did_you_mean(wanted, scores)}'
            )
        return scores


def _forgive(carry: Carry) -> Carry:
    """Return the carry with its counter at zero: a run that goes on may try again as often as the first time."""
    zero = put(np.int32(0), carry.skipped_in_a_row.sharding)
    return carry.replace(skipped_in_a_row=zero)  # pyright: ignore[reportAttributeAccessIssue]


def _metadata(program: Program, source: Source, config: LoopConfig) -> dict[str, Any]:
    """Return what a checkpoint and a resuming run must agree on; the mesh and the length of the run may change."""
    order = {'seed': config.seed, 'batch_size': config.batch_size, 'updates': config.updates, 'samples': len(source)}
    return program.metadata() | {'program': program.name} | order


def _divergence(done: int, values: Mapping[str, float], workdir: pathlib.Path) -> str:
    """Return the message of a run that skips all its steps."""
    return (
        f'step {done}: the last {values["skipped_in_a_row"]:.0f} steps had a loss or gradient that is not finite; the '
        f'state before them is saved in {workdir}. Lower the learning rate or look at the data, then run again.'
    )
