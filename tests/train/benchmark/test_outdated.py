"""Evaluations are of what is there now: after interruptions, changed settings, and in folders of older versions."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import NamedTuple

import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import shipped
from train.benchmark import evaluation, outdated, shipping
from train.benchmark import run as benchmark
from train.benchmark.chain import Chain, Step
from train.benchmark.evidence import COMBINATIONS, GENERATED, GIVEN, SAMPLING, WEIGHTS
from train.benchmark.programs import Programs
from train.benchmark.tiers import TIERS
from train.benchmark.whole_chain import WholeChain

CHAINS = ('cpu', 'cosine', 'collapse, continued', 'recovery, continued')


def made(out: pathlib.Path, name: str) -> Chain:
    """Return a chain whose folder is complete: every step, every component, and their results."""
    tier, continued, _ = name.partition(', continued')
    chain = benchmark.make_chain(tier, out, 0, shipped.find('moving_shapes') if continued else None)
    for step in chain.steps():
        write(step.result, '{}')
    for part in parts(chain):
        write(part / 'config.json', part.name)
    outdated.write_results(chain, outdated.identities(chain))
    return chain


def parts(chain: Chain) -> list[pathlib.Path]:
    """Return the component folders that an evaluation reads, but for those of the start."""
    read = [part for system in outdated.all_systems(chain).values() for part in system.parts]
    read += outdated.autoencoders(chain).values() if read else ()
    return [part for part in dict.fromkeys(read) if part.is_relative_to(chain.out)]


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def todo(chain: Chain) -> list[str]:
    return [step.name for step in benchmark.missing({step.result: (step, chain) for step in chain.steps()})]


@pytest.mark.parametrize('name', CHAINS)
def test_the_evaluation_is_due_whatever_part_of_a_system_is_another_one(tmp_path, name):
    chain = made(tmp_path, name)
    assert todo(chain) == []
    for part in parts(chain):
        write(part / 'config.json', 'trained again')
        assert todo(chain) == ['evaluation'], part
        outdated.write_results(chain, outdated.identities(chain))
        assert todo(chain) == []
    if parts(chain):
        chain.evaluation_file.unlink()
        assert todo(chain) == ['evaluation']


def test_an_evaluation_is_repeated_for_a_new_system(tmp_path):
    chain = made(tmp_path, 'cpu')
    shutil.rmtree(chain.folder / 'paper')
    assert todo(chain) == ['paper', 'evaluation']


@pytest.mark.parametrize('key', [WEIGHTS, SAMPLING, COMBINATIONS])
def test_the_evaluation_is_due_for_results_of_another_identity(tmp_path, key):
    chain = made(tmp_path, 'cpu')
    results = outdated.read_results(chain)
    outdated.write_results(chain, results | {'paper/given': results['paper/given'] | {key: 'another'}})
    assert todo(chain) == ['evaluation'] and outdated.due(outdated.identities(chain), results) == []


def test_the_evaluation_of_an_interrupted_run_is_made_up_for(tmp_path, monkeypatch):
    """A folder of an older version lacks a student; the call that trains it ends before the evaluation."""
    chain = made(tmp_path, 'collapse, continued')
    shutil.rmtree(chain.folder / 'own_half')
    results = outdated.read_results(chain)
    outdated.write_results(chain, {name: one for name, one in results.items() if not name.startswith('own_half')})
    ran = []

    def run(_: Programs, step: Step, *__: object) -> float:
        ran.append(step.name)
        if step.name == 'own_half':
            for folder in (step.result.parent, step.result.parent.with_name('context_adapter')):
                write(folder / 'config.json', 'new')
        else:
            outdated.write_results(chain, outdated.identities(chain))
        return 1.0

    monkeypatch.setattr(Programs, 'run', run)
    for only in ('train', None, None):
        benchmark.train([chain], benchmark.Options(tmp_path, 'collapse', None, (0,), only, None, 1, 1))
    assert ran == ['own_half', 'evaluation']


def without_identity(chain: Chain) -> None:
    """Leave the results of an older version."""
    results = outdated.read_results(chain)
    keys = (WEIGHTS, SAMPLING)
    old = {name: {key: one[key] for key in one if key not in keys} for name, one in results.items()}
    outdated.write_results(chain, old)


def test_results_of_an_older_version_stay_until_their_system_is_trained_again(tmp_path, monkeypatch):
    chain = made(tmp_path, 'cpu')
    wanted = outdated.read_results(chain)
    without_identity(chain)
    shutil.rmtree(chain.folder / 'regression')  # a copy for another setting
    due = []

    def run(_: Programs, step: Step, *__: object) -> float:
        if step.name == 'evaluation':
            due.extend(outdated.due(outdated.identities(chain), outdated.read_results(chain)))
        for part in outdated.all_systems(chain)['regression'].parts:
            write(part / 'config.json', part.name)  # the same weights as before: even so they are not the old ones
        return 1.0

    monkeypatch.setattr(Programs, 'run', run)
    benchmark.train([chain], benchmark.Options(tmp_path, 'cpu', None, (0,), None, None, 1, 1))
    assert due == ['regression/generated', 'regression/given']
    kept = outdated.read_results(chain)
    assert {name for name in wanted if kept[name] != wanted[name]} == set(due)


def test_a_complete_folder_of_an_older_version_is_not_evaluated_again(tmp_path):
    chain = made(tmp_path, 'cpu')
    without_identity(chain)
    shutil.rmtree(chain.folder / 'teacher_checkpoint')  # copies that someone has removed
    assert todo(chain) == []
    outdated.adopt(chain)
    assert todo(chain) == []


def test_the_checkpoint_is_written_before_the_results_that_tell_of_it(tmp_path, monkeypatch):
    """If the evaluation came first, an interruption between the two would leave an old checkpoint for good."""
    order = []
    monkeypatch.setattr(shipping, 'write', lambda chain: order.append('shipped'))
    monkeypatch.setattr(evaluation, 'evaluate', lambda chain: order.append('evaluated'))
    benchmark.run(benchmark.Options(tmp_path, 'cpu', None, (0,), 'evaluate', None, 1, 1))
    assert order == ['shipped', 'evaluated']


def test_an_evaluation_before_the_trainings_names_what_is_absent(tmp_path):
    chain = WholeChain(dataclasses.replace(TIERS['cpu'], captions=3), tmp_path, 0)
    with pytest.raises(InputError, match='native is not trained'):
        evaluation.evaluate(chain)
    with pytest.raises(InputError, match='does not exist, so that the seed cannot be evaluated'):
        shipping.write(chain)


class OneSystem(NamedTuple):
    """A system that generates the drawn clips."""

    weights: str
    sampling: str = 'one step'
    is_complete: bool = True


def test_systems_with_other_weights_are_evaluated_again(tmp_path, monkeypatch, capsys):
    """Results of older versions, without weights, are kept; students that were never trained are left out."""
    tier = dataclasses.replace(TIERS['cpu'], captions=3, students=('student', 'paper'))
    chain = WholeChain(tier, tmp_path, 0)
    generated = []
    found = {name: OneSystem('first') for name in ('teacher', 'student')}
    found['paper'] = OneSystem('', is_complete=False)
    monkeypatch.setattr(outdated, 'systems', lambda chain: found)
    monkeypatch.setattr(outdated, 'autoencoders', lambda chain: {})
    monkeypatch.setattr(
        evaluation.HeldOutCaptions, 'generate', lambda self, *system: generated.append(system[0]) or self.drawn
    )
    results = evaluation.evaluate(chain)
    assert len(generated) == 4 and 'paper is not trained, and left out' in capsys.readouterr().out
    assert set(results) == {
        *('drawn', *(f'{name}/{first}' for name in ('teacher', 'student') for first in (GENERATED, GIVEN)))
    }
    evaluation.evaluate(chain)
    assert len(generated) == 4
    for other in (OneSystem('second'), OneSystem('second', 'two steps')):
        found['student'] = other
        evaluation.evaluate(chain)
        assert generated[-2:] == [other] * 2
    old = {name: {key: one[key] for key in one if key not in (WEIGHTS, SAMPLING)} for name, one in results.items()}
    chain.evaluation_file.write_text(json.dumps(old))
    assert evaluation.evaluate(chain) == old and len(generated) == 8
