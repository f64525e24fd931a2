"""All parts of a recipe together, on the miniature checkpoint: critic, average, own histories, batches in parts."""

from __future__ import annotations

import functools
import itertools

import jax
import numpy as np
import pytest

from support.dmd_runs import placed_step, settings
from support.goldens import relative_error
from support.training_runs import copy_killed, digests
from train.dmd import program as dmd
from train.runtime.metrics import SPEED, read_metrics
from train.runtime.sharding import to_host

TREES = ('student', 'fake', 'critic', 'average')
# Every way to spread eight devices over the three axes.
MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(sizes) == 8]


@functools.cache
def after_one_step(samples: str, mesh: tuple[int, int, int], recipe: str = 'whole'):
    """Return the metrics of a step on a mesh, and the movement of every tree."""
    step, begin, frozen, batch, key = placed_step(samples, mesh, recipe)
    carry = begin()
    before = to_host(carry.state)
    carry, metrics = step(carry, frozen, batch, key)
    after = to_host(carry.state)
    moved = {name: jax.tree.map(np.subtract, getattr(after, name), getattr(before, name)) for name in TREES}
    placed_step.cache_clear()
    return to_host(metrics), moved


# Each mesh is a minute of compiling; the one that splits everything stands for all.
@pytest.mark.parametrize('recipe', ['whole', 'gathered'])
@pytest.mark.parametrize(
    'mesh', [pytest.param(mesh, marks=pytest.mark.long if mesh == (2, 2, 2) else pytest.mark.slow) for mesh in MESHES]
)
def test_meshes_agree(samples, mesh, recipe):
    want_metrics, want = after_one_step(samples, (1, 1, 1))
    metrics, moved = after_one_step(samples, mesh, recipe)
    assert metrics['own_history'] > 0 and np.isfinite(metrics['critic'])
    for name, value in want_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-6, nan_ok=True), name
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        got = functools.reduce(lambda tree, key: tree[key.key], path, moved)
        if np.any(leaf):
            assert relative_error(got, leaf) < 5e-3, path
        else:
            assert not np.any(got), path


@pytest.mark.long
def test_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(samples, tmp_path):
    whole = functools.partial(settings, samples, steps=4, recipe='whole')
    dmd.RECIPE.run(whole(tmp_path / 'unbroken'))
    dmd.RECIPE.run(whole(copy_killed(tmp_path / 'unbroken', 2, tmp_path / 'resumed')))
    assert digests(tmp_path / 'resumed' / 'result') == digests(tmp_path / 'unbroken' / 'result')
    without_speed = lambda row: {**row, **dict.fromkeys(SPEED, 0)}
    rows = [[without_speed(row) for row in read_metrics(tmp_path / name)] for name in ('resumed', 'unbroken')]
    assert rows[0] == rows[1]
    assert all(np.isfinite(row['critic']) for row in rows[0])
