"""Tiers that show a finding of the papers: recovery after pruning, and the cosine term of the text distillation."""

from __future__ import annotations

import numpy as np
import pytest

from neodragon_jax.base.video import read_image
from neodragon_jax.checkpoint import shipped
from neodragon_jax.checkpoint.folders import VIDEO_VAE
from train.benchmark.cosine_term import (
    LARGEST_BY_WINDOW,
    RUNS,
    SPIKE,
    WINDOW,
    CosineTerm,
    cosine_curves,
    cosine_table,
    cosine_targets,
    numbers_of,
)
from train.benchmark.evidence import GENERATED, GIVEN, Evidence
from train.benchmark.first_frame import first_frame_rows, first_frame_table
from train.benchmark.recovery import (
    ALONE,
    BOTH,
    FULL,
    TOTALS,
    UNTRAINED,
    Recovery,
    recovery_curves,
    recovery_table,
    recovery_targets,
    runs,
)
from train.benchmark.report import with_figure
from train.benchmark.run import make_chain
from train.benchmark.statistics import Estimator
from train.benchmark.targets import targets
from train.shapes.attributes import Estimate
from train.shapes.world import CPU


@pytest.fixture(name='recovery')
def _recovery(tmp_path) -> Recovery:
    made = make_chain('recovery', tmp_path, 0, shipped.find('moving_shapes'))
    assert isinstance(made, Recovery)
    return made


def settings(step) -> dict[str, str]:
    return dict(argument.removeprefix('--config.').split('=', 1) for argument in step.arguments)


def test_both_ways_of_the_recovery_have_the_same_steps(recovery):
    steps = {step.name: step for step in recovery.steps()}
    for total in TOTALS:
        count = lambda name: int(settings(steps[name])['loop.steps'])
        assert count(f'stage1_{total}') + count(f'both_{total}') == count(f'alone_{total}') == total
        begun = str(steps[f'stage1_{total}'].result.parent)
        assert settings(steps[f'both_{total}'])['start'] == begun
        assert 'start' not in settings(steps[f'alone_{total}'])
    alike = [{name: value for name, value in settings(steps[run]).items() if 'optimizer' in name} for run in runs()]
    assert all(one == alike[0] for one in alike) and alike[0]['flow.optimizer.kind'] == 'adamw'


def test_the_recovery_is_evaluated_with_the_parts_of_its_checkpoint(recovery):
    made = {step.result.parent for step in recovery.steps()}
    systems = recovery.systems()
    assert set(systems) == {FULL, UNTRAINED, *runs()}
    assert all(system.denoiser in made for system in systems.values())
    assert {system.root for system in systems.values()} == {recovery.start}
    assert (recovery.start / VIDEO_VAE).is_dir() and recovery.steps()[-1].result == recovery.evaluated


def recovered(worse: str) -> Evidence:
    """Return evidence in which all systems are alike except one, which is worse."""
    value = lambda name: {column: [0.5 if name == worse else 0.9, 0.0] for column in ('shape', 'all', 'mismatch')}
    names = (FULL, UNTRAINED, *runs())
    results = {f'{name}/{GENERATED}': value(name) | {'motion': [1.0, 0.0]} for name in names}
    return Evidence(results, {}, 0.0, True, runs=dict.fromkeys(runs(), 0.25))


def test_targets_of_the_recovery(recovery):
    missed = lambda seen: [one.name for one in targets(recovery) if one.reached(one.value(seen)) is False]
    assert [one.name for one in targets(recovery)] == [one.name for one in recovery_targets()]
    assert missed(recovered(UNTRAINED)) == []
    last = TOTALS[-1]
    assert missed(recovered(f'{BOTH}_{last}')) == [
        f'points lost after {last} steps of both stages',
        f'stage 2 alone, {last} steps: points lost beyond',
    ]
    seen = recovered(UNTRAINED)
    lines = recovery_table([seen], lambda value: f'{value(seen):.2f}')
    assert '| untrained | nan | 0.50 | 0.50 | 0.50 | 1.00 |' in lines
    assert '| both_50 | 0.2500 | 0.90 | 0.90 | 0.90 | 1.00 |' in lines


def test_the_recovery_is_drawn_over_its_steps(tmp_path):
    seen = recovered(f'{ALONE}_{TOTALS[0]}')
    drawn = recovery_curves(lambda value: Estimate(value(seen), 0.01))
    assert list(drawn.x) == list(TOTALS)
    right = drawn.panels['all attributes right']
    assert [one.mean for one in right['stage 2 alone']] == [0.5, 0.9, 0.9, 0.9]
    assert [one.mean for one in right['stages 1 and 2']] == [0.9] * 4
    assert {name: one.mean for name, one in drawn.levels['shape mismatch'].items()} == {
        'all blocks': 0.9,
        'not trained': 0.9,
    }
    section = with_figure(['## The recovery, drawn', '', 'table'], drawn, tmp_path)
    assert section == [
        '## The recovery, drawn',
        '',
        '![The recovery, drawn](figures/the_recovery_drawn.png)',
        '',
        'table',
    ]
    assert np.ptp(read_image(tmp_path / 'figures' / 'the_recovery_drawn.png')) == 255


def test_the_runs_of_the_cosine_term_differ_in_its_weight_alone(tmp_path):
    chain = make_chain('cosine', tmp_path, 0, None)
    assert isinstance(chain, CosineTerm)
    steps = {step.name: step for step in chain.steps()}
    given = {name: settings(steps[name]) for name in RUNS}
    differing = {key for key in given['with_cosine'] if given['with_cosine'][key] != given['without_cosine'][key]}
    assert differing == {'workdir', 'text.cosine_weight'}
    assert given['with_cosine']['text.encoder'] == 'frozen' and given['with_cosine']['text.dtype'] == 'bfloat16'
    assert [one.name for one in targets(chain)] == [one.name for one in cosine_targets()]


def metrics(spikes: int, tail: float) -> list[dict[str, float]]:
    norms = np.full(WINDOW + 100, 2.0)
    norms[WINDOW + np.arange(spikes)] = 2.0 * (SPIKE + 1)
    rows = [{'step': step, 'grad_norm': float(norm)} for step, norm in enumerate(norms)]
    end = {'eval/cosine_distance': 0.1, 'eval/cosine_distance/p99': tail, 'eval/retrieval/top1': 0.5}
    return [*rows, {'step': len(norms)} | end]


def test_spikes_are_counted_against_the_median_before_them():
    numbers = numbers_of(metrics(spikes=7, tail=0.4))
    assert max(numbers.pop(LARGEST_BY_WINDOW)) == SPIKE + 1
    assert numbers == {'spikes': 70.0, 'largest': SPIKE + 1, 'mean': 0.1, 'tail': 0.4, 'top1': 0.5}
    assert numbers_of(metrics(spikes=0, tail=0.4))['largest'] == 1.0


def test_the_cosine_term_is_judged_over_the_seeds():
    calm, wild = numbers_of(metrics(0, 0.2)), numbers_of(metrics(7, 0.4))
    seen = [Evidence({}, {}, 0.0, True, runs={'with_cosine': calm, 'without_cosine': wild}) for _ in range(2)]
    reached = [one.reached(Estimator(seen, CPU)(one.value).mean) for one in cosine_targets()]
    assert reached == [True, True, True]
    swapped = [one._replace(runs=dict(zip(RUNS, (wild, calm), strict=True))) for one in seen]
    assert [one.reached(one.value(swapped[0])) for one in cosine_targets()] == [False, False, True]
    table = cosine_table(seen, Estimator(seen, CPU))
    assert any(line.startswith('| cosine distance, 99th percentile | 0.200') for line in table)
    ((series,),) = [cosine_curves(seen, Estimator(seen, CPU)).panels.values()]
    assert [[one.mean for one in line] for line in series.values()] == [
        calm[LARGEST_BY_WINDOW],
        wild[LARGEST_BY_WINDOW],
    ]


def test_the_first_frame_is_compared_for_every_system():
    value = lambda shape: {'shape': [shape, 0.0], 'all': [0.5, 0.0], 'mismatch': [1 - shape, 0.0]}
    results = {'drawn': value(1.0), f'student/{GENERATED}': value(0.7), f'student/{GIVEN}': value(0.95)}
    seen = Evidence(results, {}, 0.0, True)
    lines = first_frame_table([seen], lambda value: f'{value(seen):.2f}')
    assert [line for line in lines if 'student' in line] == [
        '| student | 0.70 | 0.95 | 25.00 | 0.50 | 0.50 | 0.00 | 0.30 | 0.05 | 0.25 |'
    ]
    assert not any('drawn' in line for line in lines)
    shape = first_frame_rows([seen], lambda value: Estimate(value(seen), 0.1)).panels['shape right']
    assert {kind: rows['student'].mean for kind, rows in shape.items()} == {
        'first frame generated': 0.7,
        'first frame given': 0.95,
    }
