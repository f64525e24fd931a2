"""Reports of seeds that have different systems: what is left out is named, with the reason."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint.folders import STUDENT, STUDENT_ADAPTER
from support.benchmark_evidence import recorded
from train.benchmark import report
from train.benchmark.cosine_term import CosineTerm
from train.benchmark.evidence import CLIPS, COMBINATIONS, GENERATED, GIVEN, WEIGHTS, Evidence
from train.benchmark.statistics import Estimator
from train.benchmark.systems import systems
from train.benchmark.targets import gather
from train.benchmark.tiers import TIERS
from train.benchmark.whole_chain import WholeChain
from train.shapes.world import CPU

Written = Callable[[Sequence[Evidence]], str]


def chains_of(out: pathlib.Path, count: int, tier: str = 'cpu') -> list[WholeChain]:
    return [WholeChain(TIERS[tier], out, seed) for seed in range(count)]


@pytest.fixture(name='written')
def _written(tmp_path, monkeypatch) -> Written:
    """A function from the evidence of seeds to their report."""

    def write(seen: Sequence[Evidence]) -> str:
        monkeypatch.setattr(report, 'gather', lambda chain: seen[chain.seed])
        report.write(chains_of(tmp_path, len(seen)))
        return (tmp_path / 'report.md').read_text()

    return write


def without(seen: Evidence, *names: str) -> Evidence:
    return seen._replace(results={name: one for name, one in seen.results.items() if name not in names})


def both(system: str) -> tuple[str, str]:
    return f'{system}/{GENERATED}', f'{system}/{GIVEN}'


@pytest.mark.parametrize('fewer', [0, 1, 2])
@pytest.mark.parametrize('system', ['paper', 'regression', 'pruned_stage1'])
def test_a_system_that_one_seed_lacks_is_left_out_and_named(held_out, tmp_path, written, capsys, fewer, system):
    seen = recorded(held_out, 3)
    seen[fewer] = without(seen[fewer], *both(system))
    text, why = written(seen), 'not evaluated' if system == 'pruned_stage1' else 'not trained'
    assert f'Left out: {system} ({why} in seed {fewer}).\n' in text
    assert f'Left out: {system} ({why} in seed {fewer}).\n' in capsys.readouterr().out
    assert f'| {system}' not in text and '| teacher/given |' in text and '| student |' in text
    numbers = json.loads((tmp_path / 'report.json').read_text())
    assert not any(name in one for one in numbers['systems'] for name in both(system))


def test_all_that_is_left_out_has_its_reason(held_out, tmp_path, written):
    """Trained but not evaluated; evaluated with one first frame only; trained again after its evaluation."""
    seen = recorded(held_out, 3)
    regression, paper = (chains_of(tmp_path, 3)[seed].result(name) for seed, name in ((1, 'regression'), (2, 'paper')))
    (regression / STUDENT).mkdir(parents=True)
    seen[1] = without(seen[1], *both('regression'))
    seen[2] = without(seen[2], f'paper/{GIVEN}', *both('regression'))
    assert (
        'Left out: regression (not evaluated in seed 1, not trained in seed 2); paper (not trained in seed 2).'
    ) in written(seen)
    (paper / STUDENT).mkdir(parents=True)
    assert 'paper (not evaluated in seed 2).' in written(seen)


def test_results_of_earlier_weights_are_left_out(held_out, tmp_path, written):
    """A student was trained again, with other settings and without an evaluation."""
    seen = recorded(held_out, 2)
    (chain, _) = chains_of(tmp_path, 2)
    system = systems(chain)['paper']
    for part in system.parts:
        part.mkdir(parents=True)
        (part / 'config.json').write_text('{}')
    assert 'Left out' not in written(seen)  # of an older version, which did not record them
    for result in (seen[0].results[name] for name in both('paper')):
        result[WEIGHTS] = system.weights  # pyright: ignore[reportIndexIssue]
    assert 'Left out' not in written(seen)
    (chain.result('paper') / STUDENT_ADAPTER / 'config.json').write_text('{"trained": "again"}')
    sheet = chain.folder / 'evaluation' / 'paper' / f'{GENERATED}.png'
    sheet.parent.mkdir(parents=True)
    sheet.write_bytes(b'')
    text = written(seen)
    assert 'Left out: paper (changed after its evaluation in seed 0).' in text and sheet.name not in text


def test_a_report_does_without_no_system_of_its_targets(held_out, written):
    seen = recorded(held_out, 2)
    seen[1] = without(seen[1], *both('text'))
    with pytest.raises(InputError, match=r'text/generated: the report needs its results of every seed.*without --only'):
        written(seen)


def test_a_seed_of_other_captions_is_not_compared(held_out, written):
    """Captions of an older version: leaving one out of both would leave different clips out."""
    seen = recorded(held_out, 2)
    others = held_out.combinations[::-1]
    assert others != held_out.combinations
    seen[1] = seen[1]._replace(results={name: {**one, COMBINATIONS: others} for name, one in seen[1].results.items()})
    with pytest.raises(InputError, match='the report needs its results of every seed'):
        written(seen)


@pytest.mark.parametrize('oldest', [0, 1])
def test_errors_are_unknown_if_one_seed_is_of_the_oldest_version(held_out, oldest):
    """Its results have no clips."""
    seen = recorded(held_out, 2)
    old = {name: {key: one[key] for key in one if key not in (CLIPS, COMBINATIONS)}
           for name, one in seen[oldest].results.items()}  # fmt: skip
    seen[oldest] = seen[oldest]._replace(results=old)
    shape = lambda found: found.mean('student', 'shape')
    estimate = Estimator(seen, CPU)(shape)
    assert estimate.mean == pytest.approx(np.mean([shape(one) for one in seen])) and np.isnan(estimate.error)


def test_a_seed_without_any_evaluation_is_named(tmp_path):
    with pytest.raises(InputError, match=r'seed-1/evaluation.json: there is none; seed 1 is not evaluated'):
        gather(chains_of(tmp_path, 2)[1])
    with pytest.raises(InputError, match='seed-1/with_cosine: is not trained'):
        gather(CosineTerm(TIERS['cosine'], tmp_path, 1))
