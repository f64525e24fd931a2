"""Runs that are started again: what they write, and what they leave alone."""

from __future__ import annotations

import os

import pytest

from support.toy_program import LinearSource, Toy, WithEvaluations, config_for
from train.runtime.loop import run
from train.runtime.sharding import MeshConfig

SMALL = {'mesh': MeshConfig(1, 1, 1), 'log_every': 100}
BEST = {'evaluate_every': 1, 'keep_best': 1, 'best_metric': 'eval/distance', **SMALL}
SCORES = {1: 2.0, 2: 1.0, 3: 3.0, 4: 2.5}


def train(folder, steps, program=None, **settings):
    return run(program or WithEvaluations(scores=SCORES), LinearSource(), config_for(folder, steps=steps, **settings))


# --- The result -------------------------------------------------------------------------------------------------------


def test_a_finished_run_that_is_repeated_leaves_its_result_alone(tmp_path):
    train(tmp_path, 2, Toy(), **SMALL)
    (tmp_path / 'result' / 'generation.json').write_text('{}')
    before = {path.name: path.stat().st_ino for path in (tmp_path / 'result').iterdir()}
    train(tmp_path, 2, Toy(), **SMALL)
    assert {path.name: path.stat().st_ino for path in (tmp_path / 'result').iterdir()} == before
    # Another result is no mixture of two.
    train(tmp_path, 3, Toy(), **SMALL)
    assert sorted(os.listdir(tmp_path / 'result')) == ['bias.npy', 'step.txt']


@pytest.mark.parametrize('name', ['result', 'best'])
def test_results_may_be_links_to_another_disk(tmp_path, name):
    elsewhere = tmp_path / 'disk' / 'results'
    elsewhere.mkdir(parents=True)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / name).symlink_to(elsewhere)
    for steps in (2, 3):
        train(tmp_path / 'run', steps, WithEvaluations(scores={2: 2.0, 3: 1.0}), **BEST | {'evaluate_every': steps})
        assert (tmp_path / 'run' / name).is_symlink()
        assert (elsewhere / 'step.txt').read_text() == str(steps)
    assert os.listdir(elsewhere.parent) == ['results']
