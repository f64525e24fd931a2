"""The training loop: everything that a program does not own.

A program is an objective: how its state begins and what one step does to it. The loop gives it a mesh, compiled steps,
data in a fixed order, checkpoints, logs, a guard against numbers that are not finite, and a clean stop. `run` reads
from top to bottom; `jit_step` is the step that it runs and that an ahead-of-time compilation lowers.

What a step computes depends on the seed, the step and the state only, so a run that is killed and started again ends
bit for bit where an unbroken one does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from neodragon_jax.errors import InputError
from train.checkpoints import Checkpoints, stop_on_sigterm
from train.data import Source
from train.loader import Loader, abstract_batch
from train.metrics import MetricsLog, Window
from train.sharding import (
    MeshConfig,
    batch_sharding,
    bytes_per_device,
    count_parameters,
    describe,
    make_mesh,
    param_shardings,
    path_name,
    put,
    replicated,
    start_processes,
)

Metrics = dict[str, Array]

# A metric whose name ends so must be finite, or the step is skipped.
GUARDED = ('loss', 'grad_norm')
# Counters of the guard: logged as they stand, where other metrics are averaged.
COUNTERS = ('skipped', 'skipped_in_a_row')
CHECKPOINTS, RESULT = 'checkpoints', 'result'


class State(Protocol):
    """What a program trains: a `flax.struct.dataclass` with an int32 scalar `step` that the loop alone advances."""

    step: Array

    def replace(self, **changes: Any) -> Any: ...


class Program(Protocol):
    """One training objective."""

    name: str

    def frozen(self) -> Any:
        """Return the constant parameters, such as a teacher; {} for none.

        Host arrays, the same on every process. They are sharded as parameters are, and not checkpointed.
        """
        ...

    def init_state(self, key: PRNGKeyArray, frozen: Any) -> Any:
        """Return the state at step 0. Pure: it runs abstractly, then compiled, straight into its shardings."""
        ...

    def variant(self, step: int) -> Hashable:
        """Return which compiled step this iteration uses, such as its stage. A pure function of the step."""
        ...

    def train_step(
        self, variant: Any, state: Any, frozen: Any, batch: Mapping[str, Array], key: PRNGKeyArray
    ) -> tuple[Any, Metrics]:
        """Return the next state and scalar metrics.

        Pure; `key` depends on the seed and the step only. Leave `state.step` alone. The step is discarded when a
        metric whose name ends in `loss` or `grad_norm` is not finite; there must be one. Let those not depend on the
        new parameters, which would keep both copies in memory.
        """
        ...

    def finish(self, state: Any, folder: pathlib.Path) -> None:
        """Write the result into `folder`, replacing an older one. Every process calls it, with sharded arrays."""
        ...

    def metadata(self) -> dict[str, Any]:
        """Return JSON that a checkpoint must agree on to be resumed: protocol, sizes, options of the objective."""
        ...


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """What a run needs to know besides its program and its data.

    Attributes:
      workdir: the run's folder, which all processes see: checkpoints, logs and the result.
      steps: at which the run ends.
      batch_size: samples in a batch, over all devices and processes.
      updates: None for batches [batch, ...]; n for [n, batch, ...], different samples for each update in a step.
      seed: of the initial state, the data order and all randomness in steps.
      checkpoint_every: steps between checkpoints.
      keep: newest checkpoints to keep.
      log_every: steps over which metrics are averaged before they leave the devices.
      max_skips: steps skipped in a row that end the run, when metrics are logged.
      progress: draw a progress bar when standard error is a terminal.
      distributed: this is one of several processes that JAX recognises (see `start_processes`).
    """

    workdir: str
    steps: int
    batch_size: int
    updates: int | None = None
    seed: int = 0
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint_every: int = 1000
    keep: int = 3
    log_every: int = 50
    max_skips: int = 20
    progress: bool = True
    distributed: bool = False

    def __post_init__(self) -> None:
        positive = {'steps', 'batch_size', 'checkpoint_every', 'keep', 'log_every', 'max_skips'}
        for name in sorted(positive | ({'updates'} if self.updates is not None else set())):
            if getattr(self, name) < 1:
                raise InputError(f'{name} is {getattr(self, name)}; it must be at least 1.')
        if not 0 <= self.seed < 2**32:
            raise InputError(f'seed is {self.seed}; it must be in 0..2^32-1.')


class DivergedError(RuntimeError):
    """Too many steps in a row were not finite; the message tells where the last good state is."""


@flax.struct.dataclass
class Carry:
    """What goes from step to step: the program's state and the guard's counters."""

    state: Any
    skipped: Int[Array, '']
    skipped_in_a_row: Int[Array, '']


class Arguments(NamedTuple):
    """The arguments of a step: abstract arrays with shardings, or the arrays."""

    carry: Carry
    frozen: Any
    batch: dict[str, Any]
    root_key: Any


def run(program: Program, source: Source, config: LoopConfig) -> Any:
    """Train to `config.steps`, from the newest checkpoint in `config.workdir` if there is one.

    At the end `program.finish` writes to `workdir/result`. On SIGTERM, or when a pod is about to be preempted, the run
    saves a checkpoint and exits with status 0; the same command goes on from there.

    Returns:
      The program's state after the last step, sharded.
    Raises:
      InputError: the configuration does not fit the devices, the data or the checkpoint.
      DivergedError: `config.max_skips` steps in a row were not finite.
    """
    start_processes(config.distributed)
    mesh, workdir, host_frozen = make_mesh(config.mesh), pathlib.Path(config.workdir), program.frozen()
    abstract = abstract_arguments(program, host_frozen, source, config, mesh)
    with contextlib.ExitStack() as stack:
        metadata = _metadata(program, source, config)
        checkpoints = stack.enter_context(Checkpoints(workdir / CHECKPOINTS, keep=config.keep, metadata=metadata))
        start = checkpoints.latest() or 0
        if start > config.steps:
            raise InputError(f'{workdir} is at step {start} already, beyond steps = {config.steps}; raise steps.')
        log = stack.enter_context(MetricsLog(workdir, start=start, steps=config.steps, progress=config.progress))
        stop = stack.enter_context(stop_on_sigterm())
        loader = Loader(
            source,
            batch_sharding_of(config, mesh),
            batch_size=config.batch_size,
            updates=config.updates,
            seed=config.seed,
        )
        stack.callback(loader.close)
        frozen = put(host_frozen, _shardings(abstract.frozen))
        del host_frozen
        carry, root_key = _begin(program, config, abstract, frozen, checkpoints, loader)
        compiled, window = _CompiledSteps(program, abstract, log), Window(COUNTERS)

        for done in range(start + 1, config.steps + 1):
            step, batch = compiled.step(program.variant(done - 1)), next(loader)
            with jax.transfer_guard('disallow'):
                carry, metrics = step(carry, frozen, batch, root_key)
            window.add(metrics)
            log.advance()
            last = done == config.steps
            if last or done % config.log_every == 0:
                values = window.read()
                log.write(done, values)
                if values['skipped_in_a_row'] >= config.max_skips:
                    checkpoints.save(done, _forgive(carry), loader.get_state())
                    raise DivergedError(_divergence(done, values, workdir))
            # Asked every step: the processes of a pod agree on the step at which they stop.
            stopped = checkpoints.preempted(done) or stop.is_set()
            if last or stopped or done % config.checkpoint_every == 0:
                checkpoints.save(done, carry, loader.get_state())
            if stopped and not last:
                checkpoints.wait()
                log.say(f'{program.name}: stopped and saved at step {done}; run the same command to go on.')
                sys.exit(0)
        checkpoints.wait()
        program.finish(carry.state, workdir / RESULT)
    return carry.state


def plan(program: Program, source: Source, config: LoopConfig) -> str:
    """Return what `run` would do, without allocating the state: the text of --dry-run.

    Mesh, batches, parameters and bytes per device of each part of the state, and the sharding of every array.
    """
    start_processes(config.distributed)
    mesh = make_mesh(config.mesh)
    arguments = abstract_arguments(program, program.frozen(), source, config, mesh)
    lines = [f'{program.name}: {config.steps} steps on {mesh.size} of {jax.device_count()} devices']
    lines += [f'batch  {name}  {list(array.shape)}  {array.dtype}' for name, array in arguments.batch.items()]
    held = {'state': arguments.carry.state, 'frozen': arguments.frozen, 'batch': arguments.batch}
    rows = [(name, tree) for name, tree in _parts(held['state'])] + [('frozen', held['frozen'])]
    width = max(len(name) for name, _ in rows)
    for name, tree in rows:
        size = bytes_per_device(tree, _shardings(tree))
        lines.append(
            f'{name.ljust(width)}  {count_parameters(tree):>14,} numbers  {size / 2**20:>12,.2f} MiB per device'
        )
    total = sum(bytes_per_device(tree, _shardings(tree)) for tree in held.values())
    lines.append(f'{total / 2**20:,.2f} MiB per device between steps; gradients and activations come on top')
    return '\n'.join([*lines, describe(mesh, {'state': held['state'], 'frozen': held['frozen']})])


def abstract_arguments(program: Program, frozen: Any, source: Source, config: LoopConfig, mesh: Mesh) -> Arguments:
    """Return the abstract arguments of a step, with their shardings on a mesh. Nothing is allocated.

    Args:
      frozen: from `program.frozen()`, or abstract arrays like it.
    """
    frozen = _placed(mesh, jax.tree.map(_abstract, frozen))
    key = jax.eval_shape(jax.random.key, 0)
    carry = _placed(mesh, jax.eval_shape(functools.partial(_initial, program), key, frozen))
    sharding = batch_sharding_of(config, mesh)
    batch = abstract_batch(source, sharding, batch_size=config.batch_size, updates=config.updates)
    return Arguments(carry, frozen, batch, jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh)))


def jit_step(program: Program, variant: Hashable, abstract: Arguments) -> Any:
    """Return the compiled step: (carry, frozen, batch, root key) -> (carry, metrics). The carry is donated."""
    shardings = _shardings(abstract)
    mesh = shardings.root_key.mesh.abstract_mesh

    def step(*arguments: Any) -> tuple[Carry, Metrics]:
        with jax.sharding.use_abstract_mesh(mesh):  # for sharding.split_batch
            return guarded_step(program, variant, *arguments)

    return jax.jit(
        step,
        in_shardings=tuple(shardings),
        out_shardings=(shardings.carry, shardings.root_key),
        donate_argnums=0,
    )


def guarded_step(
    program: Program, variant: Hashable, carry: Carry, frozen: Any, batch: Mapping[str, Array], root_key: PRNGKeyArray
) -> tuple[Carry, Metrics]:
    """Return the carry after one step of a program; a step that is not finite changes nothing but the counters."""
    old = carry.state
    new, metrics = program.train_step(variant, old, frozen, batch, jax.random.fold_in(root_key, old.step))
    finite = _finite(program, metrics)
    state = jax.tree_util.tree_map_with_path(functools.partial(_chosen, finite), new, old)
    counters = {
        'skipped': carry.skipped + (1 - finite.astype(jnp.int32)),
        'skipped_in_a_row': jnp.where(finite, 0, carry.skipped_in_a_row + 1),
    }
    return Carry(state.replace(step=old.step + 1), **counters), metrics | counters


def _finite(program: Program, metrics: Metrics) -> Bool[Array, '']:
    """Return whether all metrics that guard a step are finite."""
    guards = [value for name, value in metrics.items() if name.endswith(GUARDED)]
    if not guards:
        raise TypeError(f'program {program.name} reports no metric that ends in {" or ".join(GUARDED)}.')
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in guards]))


def _chosen(finite: Bool[Array, ''], path: Any, new: Array, old: Array) -> Array:
    """Return the new value of one leaf of the state, or the old one."""
    if (new.shape, new.dtype) != (old.shape, old.dtype):
        raise TypeError(f'a step turns {path_name(path)} from {old.dtype}{old.shape} into {new.dtype}{new.shape}.')
    return jnp.where(finite, new, old)


def _initial(program: Program, key: PRNGKeyArray, frozen: Any) -> Carry:
    """Return the carry before the first step."""
    return Carry(program.init_state(key, frozen), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def _forgive(carry: Carry) -> Carry:
    """Return the carry with its counter at zero: a run that goes on may try again as often as the first time."""
    zero = put(np.int32(0), carry.skipped_in_a_row.sharding)
    return carry.replace(skipped_in_a_row=zero)  # pyright: ignore[reportAttributeAccessIssue]


def _begin(
    program: Program, config: LoopConfig, abstract: Arguments, frozen: Any, checkpoints: Checkpoints, loader: Loader
) -> tuple[Carry, PRNGKeyArray]:
    """Return the first or the restored carry, and the key of all steps; moves the loader to its place."""

    def keys(seed: Array) -> tuple[PRNGKeyArray, PRNGKeyArray]:
        init_key, root_key = jax.random.split(jax.random.key(seed))
        return init_key, root_key

    init_key, root_key = jax.jit(keys, out_shardings=abstract.root_key.sharding)(np.uint32(config.seed))
    if checkpoints.latest() is None:
        initial = functools.partial(_initial, program)
        return jax.jit(initial, out_shardings=_shardings(abstract.carry))(init_key, frozen), root_key
    carry, place = checkpoints.restore(abstract.carry)
    loader.set_state(place)
    return carry, root_key


class _CompiledSteps:
    """The steps of a program, each compiled when its variant first comes up."""

    def __init__(self, program: Program, abstract: Arguments, log: MetricsLog) -> None:
        self._program, self._abstract, self._log = program, abstract, log
        self._steps: dict[Hashable, Callable[..., tuple[Carry, Metrics]]] = {}

    def step(self, variant: Hashable) -> Callable[..., tuple[Carry, Metrics]]:
        """Return the step of a variant."""
        if variant not in self._steps:
            self._log.say(f'{self._program.name}: compiling the step of variant {variant!r}')
            self._steps[variant] = jit_step(self._program, variant, self._abstract)
        return self._steps[variant]


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


def batch_sharding_of(config: LoopConfig, mesh: Mesh) -> jax.sharding.NamedSharding:
    """Return the sharding of the batches of a run."""
    return batch_sharding(mesh, axis=0 if config.updates is None else 1)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return shape and type of a host array as it will be on a device."""
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))


def _placed(mesh: Mesh, tree: Any) -> Any:
    """Return a tree of abstract arrays with the shardings of parameters."""
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, tree, param_shardings(mesh, tree))


def _shardings(tree: Any) -> Any:
    """Return the shardings of a tree of abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _parts(state: Any) -> list[tuple[str, Any]]:
    """Return (name, leaves) of the fields of a state."""
    parts: dict[str, list[Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        parts.setdefault(path_name(path[:1]), []).append(leaf)
    return list(parts.items())
