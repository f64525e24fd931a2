"""Tasks that run together phase by phase, so that each phase's parameters are loaded once for all of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from neodragon_jax.base.errors import InputError

Result = TypeVar('Result')

# Task whose phases use different modules: yields the arrays that each phase passes to the next, returns the result.
Task = Generator[Any, None, Result]


def in_step(tasks: Sequence[Task[Result]]) -> Iterator[Result]:
    """Run tasks phase by phase and yield their results in order: a phase starts when all tasks have ended the last one.

    Results are yielded during the last phase, each as soon as it is ready. All tasks have the same phases.
    """
    running = list(tasks)
    while running:
        remaining = []
        for task in running:
            try:
                # A module's parameters cannot be freed until its computations have ended.
                jax.block_until_ready(next(task))
            except StopIteration as end:
                yield end.value
            else:
                remaining.append(task)
        running = remaining


def finish(task: Task[Result]) -> Result:
    """Run one task to its end and return its result."""
    return next(in_step([task]))


def finite(arrays: Any, module: str) -> Any:
    """Return the arrays that a module has computed, so that damage is found before the other modules have run.

    Args:
      arrays: a tree of arrays; None is an empty one.
      module: its name, for the message.
    Raises:
      InputError: a number is not finite.
    """
    for leaf in jax.tree.leaves(arrays):
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not jnp.isfinite(leaf).all():
            raise InputError(
                f'{module}: its output has values that are not finite numbers; copy its weights again, or compute in '
                'float32.'
            )
    return arrays
