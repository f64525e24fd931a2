"""Agreement of the processes of a run, checked before the first step.

Without this check, processes with different settings, code or data would silently train a wrong model.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import as_json
from train.runtime.processes import of_first_process

SAME_COMMAND = 'start the same commit with the same command and the same data on every host.'
PACKAGES = ('neodragon_jax', 'train', 'configs')


def code_version() -> str:
    """Return a hash of the project's source files."""
    root, digest = pathlib.Path(__file__).parents[2], hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob('*.py')):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def require_agreement(facts: Mapping[str, Any], remedy: str = SAME_COMMAND) -> None:
    """Compare facts about a run, as JSON, between its processes; all must call it.

    Args:
      remedy: end of the message.
    Raises:
      InputError: on every process, if one of them differs from process 0; the message names that process and the facts.
    """
    if jax.process_count() == 1:
        return
    given = as_json(facts)
    rows = _digests(given)
    first = of_first_process(given)
    for process, row in enumerate(rows):
        wrong = [name for name, same in zip(sorted(given), (row == rows[0]).all(axis=-1), strict=True) if not same]
        if wrong:
            told = '; '.join(differences(first[name], given[name]) for name in wrong)
            detail = f' ({told})' if process == jax.process_index() else ''
            raise InputError(f'process {process} has another {" and ".join(wrong)} than process 0{detail}; {remedy}')


def _digests(facts: Mapping[str, Any]) -> np.ndarray:
    """Return the hashes of the facts on every process, [process, fact in order of its name, byte]."""
    own = np.asarray([_digest(facts[name]) for name in sorted(facts)])
    return np.asarray(multihost_utils.process_allgather(own))


def _digest(value: Any) -> np.ndarray:
    """Return a hash of a JSON value, as bytes."""
    return np.frombuffer(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest(), np.uint8)


def differences(first: Any, other: Any, path: str = '') -> str:
    """Return the first three leaves in which two JSON values differ, as 'a.b: 1 there, 2 here'."""
    return '; '.join(_differences(first, other, path)[:3])


def _differences(first: Any, other: Any, path: str) -> list[str]:
    """Return all such leaves."""
    if isinstance(first, dict) and isinstance(other, dict):
        keys = sorted(first.keys() | other.keys())
        return [
            line
            for key in keys
            for line in _differences(first.get(key), other.get(key), f'{path}.{key}' if path else key)
        ]
    label = f'{path}: ' if path else ''
    return [] if first == other else [f'{label}{json.dumps(first)} on process 0, {json.dumps(other)} here']
