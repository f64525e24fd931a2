"""Mutated folders of training runs: damage is found and named in one line, and never used.

Seeded; a case fails if anything but the documented exceptions is raised, or if it takes longer than LONGEST_S.
"""

from __future__ import annotations

import pathlib
import random
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from support.mutations import mutated, outcome
from train.runtime.checkpoints import Checkpoints, Keep

# Seeds by number of cases: few by default, more in a slow test.
SEEDS = [(0, 25), pytest.param(1, 400, marks=pytest.mark.slow)]
KEEP = Keep(newest=2, best=1, metric='eval/loss')
METADATA = {'program': 'toy', 'seed': 3, 'optimizers': ['adamw']}
PLACE = {'data': {'position': 12, 'epoch': 1}, 'key': [7, 123456789]}


def state_of(step: int) -> dict[str, jax.Array]:
    return {'step': jnp.int32(step), 'weights': jax.random.normal(jax.random.key(step), (64, 32))}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory) -> pathlib.Path:
    """The folder of a run with two checkpoints."""
    folder = tmp_path_factory.mktemp('runs') / 'run'
    with Checkpoints(folder / 'checkpoints', keep=KEEP, metadata=METADATA) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), PLACE)
            checkpoints.wait()
            checkpoints.add_metrics(step, {'eval/loss': 1.0 / step})
    return folder


def resume(folder: pathlib.Path) -> tuple[Any, Any]:
    """Return state and place of the newest checkpoint, as a run that continues reads them."""
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state_of(1)
    )
    with Checkpoints(folder / 'checkpoints', keep=KEEP, metadata=METADATA) as checkpoints:
        return checkpoints.restore(abstract)


@pytest.mark.parametrize(('seed', 'cases'), SEEDS)
def test_mutated_folders_of_runs(workdir, tmp_path, seed, cases):
    rng, refused = random.Random(seed), 0
    assert resume(pathlib.Path(shutil.copytree(workdir, tmp_path / 'whole')))[1] == PLACE
    for number in range(cases):
        folder = pathlib.Path(shutil.copytree(workdir, tmp_path / f'{number}'))
        path = rng.choice([path for path in sorted(folder.rglob('*')) if path.is_file() and path.stat().st_size])
        path.write_bytes(mutated(path.read_bytes(), rng))
        found = outcome(lambda folder=folder: resume(folder), InputError)
        refused += found is None
        if found is not None:
            state, place = found
            want = state_of(int(state['step']))
            assert all(np.array_equal(state[name], want[name]) for name in want), path.relative_to(folder)
            assert place == PLACE, path.relative_to(folder)
        shutil.rmtree(folder)
    assert refused > cases // 10
