"""Runs that are started again: what they write, what they leave alone, and the errors that they raise again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import pytest

from neodragon_jax.base.errors import InputError
from support.toy_program import LinearSource, Toy, WithEvaluations, checkpoint_steps, config_for
from train.runtime.loop import run
from train.runtime.metrics import read_metrics
from train.runtime.program import DivergedError
from train.runtime.sharding import MeshConfig

SMALL = {'mesh': MeshConfig(1, 1, 1), 'log_every': 100}
BEST = {'evaluate_every': 1, 'keep_best': 1, 'best_metric': 'eval/distance', **SMALL}
SCORES = {1: 2.0, 2: 1.0, 3: 3.0, 4: 2.5, 5: 4.0}


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
    monkeypatch.setattr('train.runtime.checkpoints.Checkpoints.restore_state', None)
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


def test_a_result_without_checkpoints_is_not_replaced(tmp_path):
    """A folder without its checkpoints, which someone removed to save space, is no new run."""
    train(tmp_path, 3, **BEST)
    before = {path: path.read_bytes() for path in tmp_path.rglob('*.txt')} | {
        path: path.read_bytes() for path in tmp_path.glob('metrics.jsonl')
    }
    shutil.rmtree(tmp_path / 'checkpoints')
    for kept in ('result and best', 'best'):
        with pytest.raises(InputError, match=rf'has {kept}, but no checkpoint.* another config\.workdir'):
            train(tmp_path, 4, **BEST)
        assert all(path.read_bytes() == content for path, content in before.items() if path.exists())
        shutil.rmtree(tmp_path / 'result', ignore_errors=True)


# --- Runs that are stopped before an evaluation -----------------------------------------------------------------------


@dataclasses.dataclass
class Preempted(WithEvaluations):
    """A toy that gets SIGTERM in a step, and whose evaluations would outlast the notice."""

    stop_in: int = 0

    def variant(self, step):
        if step + 1 == self.stop_in:
            signal.raise_signal(signal.SIGTERM)
        return super().variant(step)

    def evaluate(self, state, frozen, folder):
        assert int(state.step) < self.stop_in, 'the state must be saved first'
        return super().evaluate(state, frozen, folder)


@pytest.mark.parametrize('steps', [2, 4], ids=['at its end', 'on its way'])
def test_a_run_that_is_stopped_saves_before_it_evaluates(tmp_path, steps):
    """The evaluation is made up, and counts as if it had been in time."""
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / 'run', steps, Preempted(scores=SCORES, stop_in=2), **BEST)
    assert not ended.value.code and checkpoint_steps(tmp_path / 'run') == [1, 2]
    assert not (tmp_path / 'run' / 'result').exists()
    for folder in ('run', 'whole'):
        train(tmp_path / folder, steps, keep=1, **BEST)
        rows = read_metrics(tmp_path / folder)
        assert [row['eval/distance'] for row in rows if 'eval/distance' in row] == list(SCORES.values())[:steps]
    # What was made up is remembered when the run is continued once more, and its checkpoint stays.
    for folder in ('run', 'whole'):
        train(tmp_path / folder, 5, keep=1, **BEST)
        assert checkpoint_steps(tmp_path / folder) == [2, 5]
    for name in ('best.json', 'best/best.json', 'best/step.txt', 'best/bias.npy'):
        assert (tmp_path / 'run' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()


@dataclasses.dataclass
class Killed(WithEvaluations):
    """A toy that is ended in an evaluation, as by the end of the notice of a preemption."""

    def evaluate(self, state, frozen, folder):
        if int(state.step) == 2:
            raise KeyboardInterrupt
        return super().evaluate(state, frozen, folder)


@pytest.mark.parametrize('every', [1, 100])
def test_a_run_that_is_ended_in_an_evaluation_loses_no_step(tmp_path, every):
    """Steps between two checkpoints of the schedule are saved, too, before they are evaluated."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / 'run', 4, Killed(scores=SCORES), checkpoint_every=every, **BEST)
    assert checkpoint_steps(tmp_path / 'run') == [1, 2]
    for folder in ('run', 'whole'):
        train(tmp_path / folder, 4, checkpoint_every=every, **BEST)
        rows = read_metrics(tmp_path / folder)
        assert [row['eval/distance'] for row in rows if 'eval/distance' in row] == list(SCORES.values())[:4]
    for name in ('best.json', 'best/best.json', 'result/bias.npy'):
        assert (tmp_path / 'run' / name).read_bytes() == (tmp_path / 'whole' / name).read_bytes()


@pytest.mark.parametrize('score', [1.0, float('nan')])
def test_an_evaluation_that_was_made_up_is_not_repeated(tmp_path, score):
    """Nor one whose metric for the best is not finite."""
    train(tmp_path, 2, **SMALL)
    for program in (WithEvaluations(scores={2: score}), Stopping()):
        train(tmp_path, 2, program, **BEST | {'evaluate_every': 2})


# --- Runs that an error ended -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Stopping(WithEvaluations):
    """A toy whose evaluation ends the run after some steps, unless the setting is changed."""

    stop: bool = True
    stop_after: int = 2

    def evaluate(self, state, frozen, folder):
        metrics = super().evaluate(state, frozen, folder)
        if self.stop and int(state.step) >= self.stop_after:
            raise DivergedError('the picture is black.', metrics)
        return metrics


@pytest.mark.parametrize('steps', [2, 4], ids=['at its end', 'on its way'])
def test_a_run_that_its_evaluation_ended_ends_again(tmp_path, steps):
    """Also on its way: a pod that restarts by itself must not train on."""
    settings = {'evaluate_every': 2, **SMALL}
    for _ in range(3):
        with pytest.raises(DivergedError, match='black'):
            train(tmp_path, steps, Stopping(), **settings)
        assert checkpoint_steps(tmp_path) == [2] and not (tmp_path / 'result').exists()
    rows = read_metrics(tmp_path)
    assert [row['step'] for row in rows if 'eval/distance' in row] == [2]
    assert os.listdir(tmp_path / 'samples' / 'step_000002') == ['bias.npy']
    assert int(train(tmp_path, steps, Stopping(stop=False), **settings).step) == steps
    assert (tmp_path / 'result' / 'step.txt').read_text() == str(steps)


@pytest.mark.parametrize('steps', [1, 2], ids=['at its end', 'on its way'])
def test_a_misspelled_metric_is_refused_until_it_is_corrected(tmp_path, steps):
    for _ in range(2):
        with pytest.raises(InputError, match=r'eval/distanse.*Did you mean "eval/distance"'):
            train(tmp_path, steps, **BEST | {'best_metric': 'eval/distanse'})
        assert not (tmp_path / 'result').exists() and not (tmp_path / 'best').exists()
    train(tmp_path, steps, **BEST)
    assert (tmp_path / 'best' / 'step.txt').read_text() == str(steps)


def test_a_metric_that_is_misspelled_later_is_found_before_the_next_step(tmp_path):
    train(tmp_path, 2, **BEST)
    with pytest.raises(InputError, match=r'eval/distanse.*Did you mean "eval/distance"'):
        train(tmp_path, 3, **BEST | {'best_metric': 'eval/distanse'})
    assert checkpoint_steps(tmp_path) == [1, 2]


def test_a_state_that_was_saved_without_its_evaluation_is_evaluated(tmp_path):
    """For instance where the run was stopped at a step that became its last."""
    train(tmp_path, 2, **SMALL)
    train(tmp_path, 2, evaluate_every=5, **SMALL)
    (row,) = read_metrics(tmp_path)
    assert row['step'] == 2 and row['eval/distance'] == 1.0 and row['loss'] > 0


def test_an_evaluation_that_passed_is_not_repeated(tmp_path):
    train(tmp_path, 2, evaluate_every=2, **SMALL)
    before = read_metrics(tmp_path)
    train(tmp_path, 2, Stopping(), evaluate_every=2, **SMALL)
    assert read_metrics(tmp_path) == before


def test_a_run_that_diverged_in_its_last_steps_ends_again(tmp_path):
    """The steps are used up, so that a repetition would find nothing to do and end well."""
    bad, settings = Toy(poison=(2, 3)), {'max_skips': 2, **SMALL, 'log_every': 1}
    for _ in range(2):
        with pytest.raises(DivergedError, match=r'step 4: the last 2 steps .* larger config\.loop\.steps'):
            train(tmp_path, 4, bad, **settings)
        assert not (tmp_path / 'result').exists()
    assert int(train(tmp_path, 5, bad, **settings).step) == 5


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
