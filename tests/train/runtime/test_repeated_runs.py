"""Runs that are started again: what they write, and what they leave alone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest

from neodragon_jax.base.errors import InputError
from support.toy_program import LinearSource, Toy, WithEvaluations, config_for
from train.runtime.loop import run
from train.runtime.sharding import MeshConfig

SMALL = {'mesh': MeshConfig(1, 1, 1), 'log_every': 100}
BEST = {'evaluate_every': 1, 'keep_best': 1, 'best_metric': 'eval/distance', **SMALL}
SCORES = {1: 2.0, 2: 1.0, 3: 3.0, 4: 2.5}


def train(folder, steps, program=None, **settings):
    return run(program or WithEvaluations(scores=SCORES), LinearSource(), config_for(folder, steps=steps, **settings))


# --- The best result --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class TwoScores(WithEvaluations):
    """A toy with a second metric, which is highest at step 1."""

    def evaluate(self, state, frozen, folder):
        return super().evaluate(state, frozen, folder) | {'other': -float(state.step)}


@pytest.mark.parametrize('lost', ['best', 'best/best.json'])
@pytest.mark.parametrize(('done', 'steps'), [(2, 3), (3, 4), (4, 4)], ids=['newest', 'an older one', 'at the end'])
def test_a_best_result_that_is_not_there_is_written(tmp_path, done, steps, lost):
    """A run that was killed before it wrote the result, or an earlier version, leaves checkpoints without RUN/best."""
    train(tmp_path, done, **BEST)
    path = tmp_path / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(tmp_path, steps, **BEST)
    assert (tmp_path / 'best' / 'step.txt').read_text() == '2'
    assert json.loads((tmp_path / 'best' / 'best.json').read_text()) == {
        'step': 2,
        'eval/distance': 1.0,
        'mode': 'min',
    }


@pytest.mark.parametrize(
    ('changes', 'best'),
    [({'best_mode': 'max'}, '3'), ({'best_metric': 'eval/other', 'best_mode': 'max'}, '1')],
    ids=['mode', 'metric'],
)
def test_the_best_result_follows_another_metric(tmp_path, changes, best):
    train(tmp_path, 3, TwoScores(scores=SCORES), **BEST)
    assert (tmp_path / 'best' / 'step.txt').read_text() == '2'
    train(tmp_path, 4, TwoScores(scores=SCORES), **BEST | changes)
    assert (tmp_path / 'best' / 'step.txt').read_text() == best
    listed = json.loads((tmp_path / 'best.json').read_text())['best_first'][0]
    assert json.loads((tmp_path / 'best' / 'best.json').read_text()).items() >= listed.items()


def test_a_best_result_that_is_there_costs_nothing(tmp_path, monkeypatch):
    train(tmp_path, 3, **BEST)
    before = (tmp_path / 'best').stat().st_ino
    monkeypatch.setattr('train.runtime.checkpoints.Checkpoints.restore_best', None)
    train(tmp_path, 4, **BEST)
    assert (tmp_path / 'best').stat().st_ino == before


def test_a_damaged_best_checkpoint_is_named(tmp_path):
    train(tmp_path, 3, **BEST)
    shutil.rmtree(tmp_path / 'best')
    for path in (tmp_path / 'checkpoints' / '2' / 'state').rglob('*'):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r'checkpoints/2: the checkpoint is damaged .*; delete this folder to contin'):
        train(tmp_path, 4, **BEST)
    shutil.rmtree(tmp_path / 'checkpoints' / '2')
    train(tmp_path, 4, **BEST)
    assert (tmp_path / 'best' / 'step.txt').read_text() == '1'


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
