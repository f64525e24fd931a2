"""Checkpoints of Orbax: trees of arrays, such as a component's parameters, written and read with their shardings.

The released layout (`checkpoint.components`) holds whole arrays, which one process reads and writes. Orbax writes each
shard from its device and reads it onto any mesh, so that no process holds a whole model.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import orbax.checkpoint as ocp

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.paths import user_path

Path = str | os.PathLike[str]


def save_native(folder: Path, tree: Any) -> None:
    """Write a tree of arrays as an Orbax checkpoint; the folder appears when it is complete.

    In a run of several processes, all call it.

    Args:
      folder: must not exist.
      tree: arrays of NumPy or JAX; sharded ones are written shard by shard.
    Raises:
      InputError: the folder exists.
    """
    path = user_path(folder, 'Orbax checkpoint').absolute()
    if path.exists():
        raise InputError(f'{folder}: exists. Choose another folder, or remove it.')
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore_native(folder: Path, target: Any = None) -> Any:
    """Read a checkpoint that `save_native` wrote.

    To read a component onto a mesh, give its shapes with shardings:

        shapes = abstract_params(load_module(component_folder))
        split = NamedSharding(mesh, PartitionSpec('data'))
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), shapes)
        params = restore_native(folder, target)

    Args:
      target: tree of arrays or of `jax.ShapeDtypeStruct` with the wanted types and shardings; its arrays are not
        changed. None restores as saved: NumPy's arrays as such, JAX's with their shardings, on the same devices.
    Raises:
      InputError: the folder is absent, damaged, or holds another tree or other shapes.
    """
    path = user_path(folder, 'Orbax checkpoint').absolute()
    if not path.is_dir():
        raise InputError(f'{folder}: no such folder. Pass one that save_native wrote.')
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(path, target)
    except (FileNotFoundError, ValueError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise InputError(f'{folder}: not a complete Orbax checkpoint of this tree ({reason}).') from None
    if target is not None:
        _check(folder, restored, target)
    return restored


def _check(folder: Path, restored: Any, target: Any) -> None:
    """Raise InputError unless the arrays are those asked for: Orbax itself compares only shapes of sharded targets."""
    wanted, _ = jax.tree_util.tree_flatten_with_path(target)
    for (path, want), got in zip(wanted, jax.tree.leaves(restored), strict=True):
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            raise InputError(
                f'{folder}: {jax.tree_util.keystr(path, simple=True, separator="/")} is {got.dtype} {list(got.shape)}, '
                f'not {want.dtype} {list(want.shape)}. Ask for what is in it.'
            )
