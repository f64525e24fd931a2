"""The tiers `collapse` and `one_step`: chains, targets and report sections, on drawn clips and their distortions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from train.benchmark import report
from train.benchmark.evidence import CLIPS, COMBINATIONS, DRAWN, GENERATED, GIVEN, Evidence
from train.benchmark.motion import (
    late_units,
    motion_columns,
    motion_curves,
    motion_kept,
    motion_table,
    motion_targets,
    spread_of,
    variety_of,
)
from train.benchmark.recipes import recipe_rows, recipe_table
from train.benchmark.statistics import Estimator
from train.benchmark.students import HISTORIES, ONE_STEP
from train.benchmark.systems import systems
from train.benchmark.targets import recipe_targets, targets
from train.benchmark.tiers import TIERS
from train.benchmark.whole_chain import WholeChain
from train.shapes.attributes import Estimate, estimate
from train.shapes.source import MovingShapesSource
from train.shapes.world import COLLAPSE, CPU

FRAMES, UNITS, CLIPS_DRAWN = 65, 8, 40


@pytest.fixture(scope='module')
def source() -> MovingShapesSource:
    return MovingShapesSource(COLLAPSE, FRAMES, (64, 64), seed=3, count=CLIPS_DRAWN, split='held_out')


def result(source: MovingShapesSource, videos: np.ndarray) -> dict[str, Any]:
    every = COLLAPSE.combinations('all')
    combinations = [every.index(source.scene(index).traits) for index in range(len(source))]
    columns = motion_columns(videos, COLLAPSE)
    means = {name: list(estimate(np.array(values), combinations)) for name, values in columns.items()}
    return means | {CLIPS: columns, COMBINATIONS: combinations}


@pytest.fixture(scope='module')
def evidence(source) -> Evidence:
    """Return results of systems like the drawn clips, of one that stops after unit 6, and of one without variety."""
    drawn = np.stack([source[index]['video'] for index in range(len(source))])
    stops = drawn.copy()
    stops[:, 49:] = stops[:, 48:49]
    # For every caption, the clip of its first scene.
    told = [COLLAPSE.captioned(source.scene(index).traits) for index in range(len(source))]
    same = drawn[[told.index(one) for one in told]]
    seen = {'text': drawn, 'own_history': drawn, 'matching': drawn, 'student': stops, 'regression': same}
    results = {DRAWN: result(source, drawn)}
    results |= {f'{name}/{GENERATED}': result(source, videos) for name, videos in seen.items()}
    return Evidence(results, {}, 0.0, True)


@pytest.mark.long
def test_motion_and_variety_of_distorted_clips(evidence):
    generated = lambda name: f'{name}/{GENERATED}'
    assert motion_kept(evidence, generated('own_history'), range(1, UNITS + 1)) == pytest.approx(1)
    assert motion_kept(evidence, generated('student'), late_units(UNITS)) == pytest.approx(0, abs=0.02)
    assert motion_kept(evidence, generated('student'), range(1, 7)) == pytest.approx(1, abs=0.02)
    assert variety_of(evidence, generated('regression'), COLLAPSE) == pytest.approx(0, abs=0.02)
    assert variety_of(evidence, DRAWN, COLLAPSE) > 0.5
    spread = lambda name: spread_of(evidence, name, COLLAPSE, UNITS)
    assert spread(DRAWN) == spread(generated('student')) == 1
    assert spread(generated('regression')) == pytest.approx(0, abs=0.02)


def test_targets_find_the_student_that_stops_and_the_mean_one(evidence):
    verdicts = {
        target.name: target.reached(target.value(evidence))
        for target in motion_targets(COLLAPSE, UNITS, HISTORIES[:-1], 'text')
    }
    assert verdicts['own_history: motion kept in the last units, 1 as drawn'] is True
    assert verdicts['student: motion kept in the last units, 1 as drawn'] is None
    assert verdicts["matching: variety of direction over its teacher's"] is True
    assert verdicts["regression: variety of direction over its teacher's"] is True
    stopped = evidence._replace(
        results={**evidence.results, f'own_history/{GENERATED}': evidence.results[f'student/{GENERATED}']}
    )
    (target,) = (
        one for one in motion_targets(COLLAPSE, UNITS, HISTORIES, 'text') if one.name.startswith('own_history: motion')
    )
    assert target.reached(target.value(stopped)) is False


def test_the_table_has_errors_of_clustered_clips(evidence):
    lines = motion_table([evidence], Estimator([evidence], COLLAPSE), COLLAPSE, UNITS)
    (row,) = (line for line in lines if line.startswith('| student/generated'))
    cells = row.split('|')[2:-1]
    assert len(cells) == UNITS + 2
    assert [cell.strip()[:5] for cell in cells[6:8]] == ['0.000', '0.000']
    assert cells[0].strip().startswith('1.000')
    drawn = next(line for line in lines if line.startswith('| drawn'))
    assert float(drawn.split('|')[-3].partition('±')[2]) > 0
    (series,) = motion_curves([evidence], Estimator([evidence], COLLAPSE), UNITS).panels.values()
    assert list(series) == [DRAWN, 'text', 'own_history', 'matching', 'student', 'regression']
    assert [str(one) for one in series['student']] == [cell.strip() for cell in cells[:UNITS]]


def test_chains_of_the_tiers(tmp_path):
    for name, students in (('collapse', HISTORIES), ('one_step', ONE_STEP)):
        chain = WholeChain(TIERS[name], tmp_path, 0)
        names = [step.name for step in chain.steps()]
        assert [one for one in names if one in students] == list(students)
        assert not {'importance', 'stage1', 'text_without_cosine'} & set(names)
        assert set(systems(chain)) == {'teacher', 'text', 'teacher_1', *students}
        assert not any('pruning' in target.name for target in targets(chain))
    steps = {step.name: step for step in WholeChain(TIERS['one_step'], tmp_path, 0).steps()}
    start = str(steps['consistency'].result.parent)
    assert f'--config.dmd.start={start}' in steps['after_consistency'].arguments
    assert '--config=configs/dmd.py:shapes-adversarial' in steps['adversarial'].arguments
    assert systems(WholeChain(TIERS['one_step'], tmp_path, 0))['even'].steps == (2, 2, 1)


def test_recipes_are_compared_with_their_teacher():
    columns = {'shape': 0.9, 'all': 0.8, 'steady': 0.7, 'mismatch': 0.2, 'motion': 1.0, 'saturation': 0.5}
    results = {
        f'{name}/{first}': {column: [value - 0.05 * (name == 'student'), 0.0] for column, value in columns.items()}
        for name in ('text', 'teacher_1', *ONE_STEP)
        for first in (GENERATED, GIVEN)
    }
    seen = Evidence(results, {}, 0.0, True)
    lines = recipe_table([seen], lambda value: f'{value(seen):.2f}', ONE_STEP, 'text')
    assert '| student | generated | 5.00 | 0.00 | 0.85 | 0.75 | 0.15 | 0.95 | 0.45 |' in lines
    assert '| adversarial | given | 0.00 | 0.05 | 0.90 | 0.80 | 0.20 | 1.00 | 0.50 |' in lines
    rows = recipe_rows(lambda value: Estimate(value(seen), 0.1), ONE_STEP, 'text')
    mismatch = rows.panels['shape mismatch']['first frame generated']
    assert list(mismatch) == ['teacher', 'teacher at 1-1-1', *ONE_STEP]
    assert mismatch['student'].mean == pytest.approx(0.15) and mismatch['even'].mean == 0.2
    assert len(rows.figure().axes) == len(rows.panels)


def test_the_best_recipe_is_judged_on_captions_that_did_not_choose_it():
    """Of equally good recipes, one is right by chance where it was chosen: that is no merit."""
    rng = np.random.default_rng(0)
    numbers = [number for number, traits in enumerate(CPU.combinations('all')) if CPU.is_held_out(traits)]
    combinations = np.repeat(numbers, 4)

    def system(right: float) -> dict[str, Any]:
        shape = (rng.random(len(combinations)) < right).astype(float)
        clips = {'shape': shape, 'mismatch': 1 - shape / 2}
        means = {name: [float(np.mean(values)), 0.0] for name, values in clips.items()}
        return means | {CLIPS: clips, COMBINATIONS: combinations}

    names = ('text', *(f'recipe{number}' for number in range(40)))
    losses = []
    for _ in range(12):
        results = {f'{name}/{first}': system(0.5) for name in names for first in (GENERATED, GIVEN)}
        seen = Evidence({DRAWN: system(1.0), **results}, {}, 0.0, True)
        lost, *_ = recipe_targets(names[1:], 'text', CPU)
        losses.append(lost.value(seen))
    # Chosen on the captions that judge it, the best of 40 would be 11 points above 0.5.
    assert np.mean(losses) == pytest.approx(0, abs=4)


def test_a_caption_stays_in_its_half_when_another_is_left_out():
    """The error of the best recipe is found by leaving captions out; halves that change with them would widen it."""
    rng = np.random.default_rng(1)
    every = CPU.combinations('all')
    combinations = np.array([number for number, traits in enumerate(every) if CPU.is_held_out(traits)])
    captions = [every[number] for number in combinations]
    right = {name: (rng.random(len(captions)) < 0.5).astype(float) for name in ('text', 'a', 'b', 'c')}
    results: dict[str, Any] = {
        f'{name}/{GENERATED}': {'shape': [shape.mean(), 0.0], CLIPS: {'shape': shape}, COMBINATIONS: combinations}
        for name, shape in right.items()
    }
    results[DRAWN] = results[f'text/{GENERATED}']
    seen, (lost, *_) = Evidence(results, {}, 0.0, True), recipe_targets(('a', 'b', 'c'), 'text', CPU)
    half = np.array([sorted(captions).index(caption) % 2 == 0 for caption in captions])

    def fixed(kept: np.ndarray) -> float:
        values = []
        for chosen, rest in ((half, ~half), (~half, half)):
            best = max('abc', key=lambda name: right[name][chosen & kept].mean())
            values.append(100 * (right['text'][rest & kept].mean() - right[best][rest & kept].mean()))
        return float(np.mean(values))

    for place in range(len(captions)):
        kept = np.arange(len(captions)) != place
        assert lost.value(seen.only(kept)) == pytest.approx(fixed(kept)), captions[place]
    # Captions of one half alone leave nothing to judge.
    assert np.isnan(lost.value(seen.only(half)))


def test_a_student_that_was_added_later_is_left_out_of_reports(evidence, tmp_path, monkeypatch):
    """Of a folder of an older version, only the first seed has `own_half`; the other students are still reported."""
    right = {'shape': [1.0, 0.0], 'all': [1.0, 0.0]}
    older = {DRAWN: evidence.results[DRAWN]}
    for name, one in evidence.results.items():
        older |= {
            f'{name.removesuffix(GENERATED)}{first}': right | one for first in (GENERATED, GIVEN) if name != DRAWN
        }
    newer = older | {f'own_half/{first}': older[f'matching/{first}'] for first in (GENERATED, GIVEN)}
    monkeypatch.setattr(report, 'gather', lambda chain: evidence._replace(results=(newer, older)[chain.seed]))
    report.write([WholeChain(TIERS['collapse'], tmp_path, seed) for seed in (0, 1)])
    text = (tmp_path / 'report.md').read_text()
    assert 'own_half (not trained in seed 1)' in text and '| own_half' not in text
    for section in ('## Targets', '## Motion by unit', '## The first frame', '## Every system'):
        assert '\n| own_history' in text.partition(section)[2].partition('\n## ')[0], section


def test_own_history_from_the_start_leaves_half_of_the_regression(tmp_path):
    steps = {step.name: step for step in WholeChain(TIERS['collapse'], tmp_path, 0).steps()}
    shares = lambda name: {one for one in steps[name].arguments if one.startswith('--config.dmd.own_history')}
    assert shares('own_half') == {'--config.dmd.own_history.first=0.5', '--config.dmd.own_history.last=0.5'}
    assert '--config.dmd.own_history.last=1.0' in shares('own_history')
