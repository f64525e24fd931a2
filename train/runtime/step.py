"""The compiled step: a program's step inside a guard against non-finite numbers.

`abstract_arguments` returns the shapes and shardings of the arguments of a step, and `jit_step` the step for them. The
loop runs this step, the plan counts its FLOPs, and an ahead-of-time compilation lowers it.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from train.data import Source
from train.runtime.loader import abstract_batch
from train.runtime.program import LoopConfig, Metrics, Program
from train.runtime.sharding import batch_sharding, param_shardings, path_name, replicated

# A step is skipped if a metric with one of these suffixes is not finite.
GUARDED = ('loss', 'grad_norm')
# Number of steps within which every variant of a program's step occurs.
STEPS_SEEN = 1000
# Counters of the guard, logged without averaging.
COUNTERS = ('skipped', 'skipped_in_a_row')


@flax.struct.dataclass
class Carry:
    """The carry of a step: the program's state and the guard's counters."""

    state: Any
    skipped: Int[Array, '']
    skipped_in_a_row: Int[Array, '']


class Arguments(NamedTuple):
    """The arguments of a step: abstract arrays with shardings, or concrete arrays."""

    carry: Carry
    frozen: Any
    batch: dict[str, Any]
    root_key: Any


def abstract_arguments(program: Program, frozen: Any, source: Source, config: LoopConfig, mesh: Mesh) -> Arguments:
    """Return the abstract arguments of a step, with their shardings on a mesh. Nothing is allocated.

    Args:
      frozen: result of `program.frozen()`, or abstract arrays of the same structure.
    """
    frozen = _placed(mesh, jax.tree.map(_abstract, frozen))
    key = jax.eval_shape(jax.random.key, 0)
    carry = _placed(mesh, jax.eval_shape(functools.partial(initial, program), key, frozen))
    sharding = batch_sharding_of(config, mesh)
    batch = abstract_batch(source, sharding, batch_size=config.batch_size, updates=config.updates)
    return Arguments(carry, frozen, batch, jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh)))


def jit_step(program: Program, variant: Hashable, abstract: Arguments) -> Any:
    """Return the compiled step: (carry, frozen, batch, root key) -> (carry, metrics). The carry is donated."""
    shardings = shardings_of(abstract)
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
    """Return the carry after one step of a program; a non-finite step only changes the counters."""
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
    """Return whether all guarded metrics of a step are finite."""
    guards = [value for name, value in metrics.items() if name.endswith(GUARDED)]
    if not guards:
        raise TypeError(f'program {program.name} reports no metric that ends in {" or ".join(GUARDED)}.')
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in guards]))


def _chosen(finite: Bool[Array, ''], path: Any, new: Array, old: Array) -> Array:
    """Return the new value of one leaf of the state, or the old one."""
    if (new.shape, new.dtype) != (old.shape, old.dtype):
        raise TypeError(f'a step turns {path_name(path)} from {old.dtype}{old.shape} into {new.dtype}{new.shape}.')
    return jnp.where(finite, new, old)


def initial(program: Program, key: PRNGKeyArray, frozen: Any) -> Carry:
    """Return the carry before the first step."""
    return Carry(program.init_state(key, frozen), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def variants(program: Program, steps: int = STEPS_SEEN) -> dict[Hashable, float]:
    """Return the variants of a program's steps, sorted, with their shares of the first steps."""
    seen = [program.variant(step) for step in range(steps)]
    return {variant: seen.count(variant) / len(seen) for variant in sorted(set(seen))}  # pyright: ignore[reportArgumentType]


def batch_sharding_of(config: LoopConfig, mesh: Mesh) -> jax.sharding.NamedSharding:
    """Return the sharding of the batches of a run."""
    return batch_sharding(mesh, axis=0 if config.updates is None else 1)


def shardings_of(tree: Any) -> Any:
    """Return the shardings of a tree of abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and type of a host array on a device."""
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))


def _placed(mesh: Mesh, tree: Any) -> Any:
    """Return a tree of abstract arrays with the shardings of parameters."""
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, tree, param_shardings(mesh, tree))
