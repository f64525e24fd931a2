"""Compilation of functions whose arguments lie on a device mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
from jax.sharding import AbstractMesh, NamedSharding


def jit_on_mesh(function: Callable[..., Any], static_argnums: tuple[int, ...] = ()) -> Callable[..., Any]:
    """Return a compiled function that sees the mesh on which its arguments lie, as the step of a training does.

    A function that runs a model outside of such a step needs this: without it, the activations are not kept split, and
    a TPU's attention kernel cannot be compiled for several devices.

    Args:
      function: of trees of arrays. Called inside another compiled function, it sees that one's mesh.
      static_argnums: positions of its arguments that are not arrays.
    """

    def run(mesh: AbstractMesh | None, *arguments: Any) -> Any:
        if mesh is None:
            return function(*arguments)
        with jax.sharding.use_abstract_mesh(mesh):
            return function(*arguments)

    compiled = jax.jit(run, static_argnums=(0, *(position + 1 for position in static_argnums)))
    return lambda *arguments: compiled(_mesh_of(arguments), *arguments)


def _mesh_of(arguments: Any) -> AbstractMesh | None:
    """Return the mesh of the first array that is placed on one; None if no array is, and while tracing."""
    for leaf in jax.tree.leaves(arguments):
        placed = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        if placed and isinstance(leaf.sharding, NamedSharding):
            return leaf.sharding.mesh.abstract_mesh
    return None
