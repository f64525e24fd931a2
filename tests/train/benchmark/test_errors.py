"""Errors and verdicts of the benchmark's numbers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from support.benchmark_evidence import chain, evidence, recorded
from train.benchmark import report as benchmark_report
from train.benchmark.evaluation import HeldOutCaptions
from train.benchmark.evidence import CLIPS, COMBINATIONS, Evidence, Target
from train.benchmark.statistics import Estimator, student_factor
from train.benchmark.tiers import TIERS
from train.shapes import attributes
from train.shapes.world import COLLAPSE, CPU, WORLDS


def test_errors_of_a_mean_are_those_of_its_clusters(held_out):
    one, *_ = seen = recorded(held_out, 1)
    shape = lambda found: found.mean('student', 'shape')
    values = np.array(one.results['student/generated'][CLIPS]['shape'])
    combinations = np.array(held_out.combinations)
    assert len(set(combinations)) < len(combinations)
    left_out: Any = [values[combinations != group].mean() for group in set(combinations)]
    count = len(left_out)
    want = np.sqrt((count - 1) / count * np.sum((left_out - np.mean(left_out)) ** 2))
    estimate = Estimator(seen, CPU)(shape)
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.error == pytest.approx(want) and want > 0.05
    # Near the cluster-robust error, which holds for equal clusters.
    assert estimate.error == pytest.approx(attributes.estimate(values, held_out.combinations).error, rel=0.25)
    # A difference of two systems that are wrong together has no error.
    assert Estimator(seen, CPU)(lambda found: shape(found) - found.mean('student', 'all')).error == pytest.approx(
        0, abs=1e-12
    )


def test_errors_count_seeds_as_random(held_out):
    seen = recorded(held_out, 3)
    shape = lambda found: found.mean('student', 'shape')
    by_seed = [shape(found) for found in seen]
    estimate = Estimator(seen, CPU)(shape)
    assert estimate.mean == pytest.approx(np.mean(by_seed))
    assert estimate.error >= student_factor(3) * np.std(by_seed, ddof=1) / np.sqrt(3)
    assert np.isnan(Estimator([evidence(held_out)], CPU)(shape).error)  # results of older versions have no clips
    # Trainings without clips differ by seed alone; one seed says nothing of the error.
    runs = [Evidence({}, {}, 0.0, True, runs={'run': float(number)}) for number in (1, 2, 3)]
    estimate = Estimator(runs, CPU)(lambda found: found.runs['run'])
    assert estimate.error == pytest.approx(student_factor(3) / np.sqrt(3))
    assert np.isnan(Estimator(runs[:1], CPU)(lambda found: found.runs['run']).error)


def test_two_errors_of_few_seeds_are_a_confidence_interval():
    assert student_factor(2) == pytest.approx(12.706 / 1.96, rel=1e-3)
    assert student_factor(12) == pytest.approx(2.201 / 1.96, rel=2e-3)
    assert student_factor(500) == pytest.approx(1, abs=0.01)


def test_a_share_of_1_has_the_error_of_one_wrong_caption(held_out):
    seen = recorded(held_out, 1)
    captions = held_out.told
    groups = len(set(captions))
    most = min((captions.count(one) / len(captions) for one in captions), key=lambda share: abs(share - 1 / groups))
    estimate = Estimator(seen, CPU)
    color = lambda system: lambda found: found.mean(system, 'color')
    assert estimate(color('teacher')).mean == 1 and estimate(color('teacher')).error == pytest.approx(most)
    # Either of two systems may be wrong where both were right.
    lost = lambda found: 100 * (color('teacher')(found) - color('student')(found))
    assert estimate(lost).mean == 0 and estimate(lost).error == pytest.approx(100 * most * np.sqrt(2))
    accuracy = estimate(lambda found: found.accuracy('teacher'))
    assert accuracy.error == pytest.approx(most / 6 * np.sqrt(6))
    # In several seeds, it is wrong in all.
    assert Estimator(recorded(held_out, 3), CPU)(color('teacher')).error == pytest.approx(most)


def test_numbers_without_clips_have_no_error_in_one_seed(held_out):
    (seen,) = recorded(held_out, 1)
    estimate = Estimator([seen], CPU)
    for value in (
        lambda found: found.text_cosine['text'],
        lambda found: found.number('native', 'psnr_db') - found.number('small', 'psnr_db'),
    ):
        assert np.isnan(estimate(value).error) and str(estimate(value)).count('±') == 0
    three = [seen._replace(text_cosine={'text': value}) for value in (0.98, 0.99, 1.0)]
    error = Estimator(three, CPU)(lambda found: found.text_cosine['text']).error
    assert error == pytest.approx(student_factor(3) * 0.01 / np.sqrt(3))
    # PSNR is recorded by clip.
    clips = {'psnr_db': np.arange(len(held_out.told), dtype=float)}
    native = {**seen.results['native'], 'psnr_db': [5.5, 0.0], CLIPS: {**seen.results['native'][CLIPS], **clips}}
    by_clip = seen._replace(results={**seen.results, 'native': native})
    assert Estimator([by_clip], CPU)(lambda found: found.number('native', 'psnr_db')).error > 0


def row_of(mean: float, error: float, **bounds: Any) -> benchmark_report.Row:
    return benchmark_report.Row(Target('', lambda seen: 0.0, **bounds), (mean,), attributes.Estimate(mean, error))


def test_verdicts_without_an_error_claim_no_certainty():
    assert row_of(6.0, float('nan'), most=5.0).verdict == '**no**, error unknown'
    assert row_of(4.0, float('nan'), most=5.0).verdict == 'yes, error unknown'
    assert row_of(4.0, 0.1, most=5.0).verdict == 'yes'
    facts = row_of(11.0, float('nan'), least=10.0, exact=True)
    assert (facts.verdict, facts.shown) == ('yes', '11.000')
    assert 'no variation of training' in benchmark_report.errors_of(1)
    assert 'no variation' not in benchmark_report.errors_of(2)


def test_clips_are_clustered_by_what_their_captions_tell(tmp_path):
    """Direction and speed that a caption omits make no cluster of their own."""
    for name, tier in TIERS.items():
        told = HeldOutCaptions(dataclasses.replace(tier, captions=48, frames=9, height=64, width=64))
        groups = len(set(told.told))
        if WORLDS[tier.world].omitted:
            assert groups < len(set(told.combinations)) and groups <= 24
        else:
            pairs = set(zip(told.told, told.combinations, strict=True))
            assert groups == len(set(told.combinations)) == len(pairs), name
    # Two combinations of one caption are left out together, and then nothing is left.
    every = COLLAPSE.combinations('all')
    alike = [
        number for number, traits in enumerate(every) if COLLAPSE.captioned(traits) == COLLAPSE.captioned(every[0])
    ]
    system = {'unit1': [0.5, 0.0], CLIPS: {'unit1': [0.0, 1.0]}, COMBINATIONS: alike[:2]}
    seen = Evidence({'drawn': system, 'student/generated': system}, {}, 0.0, True)
    assert np.isnan(Estimator([seen], COLLAPSE)(lambda found: found.mean('student', 'unit1')).error)


def test_verdicts_tell_what_is_within_the_error(held_out, tmp_path, monkeypatch):
    run = chain(tmp_path)
    (seen,) = recorded(held_out, 1)
    monkeypatch.setattr(benchmark_report, 'gather', lambda chain: seen)
    assert benchmark_report.write([run]) > 0
    verdicts = (tmp_path / 'verdicts.md').read_text()
    lost = 100 * (1 - seen.mean('student', 'shape'))
    (line,) = [line for line in verdicts.splitlines() if line.startswith('| student: points of shape lost')]
    assert line.startswith(f'| student: points of shape lost to its teacher | at most 5 | {lost:.3f} ± ')
    assert line.count('**no**') == 2 and len({row.count('|') for row in verdicts.splitlines()}) == 1
    report = json.loads((tmp_path / 'report.json').read_text())
    assert row_of(6.0, 1.0, most=5.0).verdict == '**no**, within the error'
    assert report['targets']['student: points of shape lost to its teacher']['error'] > 0
