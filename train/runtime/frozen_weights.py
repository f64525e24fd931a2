"""Identity of a run's frozen weights: a run does not continue with another teacher, encoder or loss network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax

from neodragon_jax.base.errors import InputError
from train.runtime.checksum import checksums
from train.runtime.sharding import path_name


def identities(frozen: Any) -> dict[str, dict[str, str]]:
    """Return part -> {types, digest} of frozen arrays on a mesh; every process must call it.

    Args:
      frozen: dictionary of parts, such as `teacher`; or one part, a tree.
    """
    types: dict[str, set[str]] = {}
    sums: dict[str, dict[str, int]] = {}
    leaves = jax.tree_util.tree_leaves_with_path(frozen)
    for (path, leaf), value in zip(leaves, checksums(frozen).values(), strict=True):
        part = path_name(path[:1])
        types.setdefault(part, set()).add(str(leaf.dtype))
        sums.setdefault(part, {})[path_name(path[1:])] = value
    return {part: {'types': ' '.join(sorted(types[part])), 'digest': _digest(sums[part])} for part in sums}


def _digest(sums: Mapping[str, int]) -> str:
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def require_same(recorded: Mapping[str, Any], found: Mapping[str, Any], run: object) -> None:
    """Check the frozen weights of a resumed run.

    A part is not compared where its types differ: a run may continue in another precision.

    Args:
      recorded, found: results of `identities`, of the checkpoint and of this run.
      run: folder of the run, for the message.
    Raises:
      InputError: weights differ.
    """
    others = [
        part
        for part in sorted(recorded.keys() | found.keys())
        if recorded.get(part) != found.get(part) and not _in_other_types(recorded.get(part), found.get(part))
    ]
    if others:
        raise InputError(
            f'{run}: its checkpoint was trained with other frozen weights, {", ".join(others)}: give the weights that '
            'it began with, or another config.workdir to begin anew.'
        )


def _in_other_types(recorded: Mapping[str, str] | None, found: Mapping[str, str] | None) -> bool:
    return recorded is not None and found is not None and recorded['types'] != found['types']
