"""The benchmark on moving shapes: commands are valid, drawn attributes are read correctly, targets have errors."""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import json
import pathlib
import re
import shutil
from typing import Any

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import shipped
from neodragon_jax.checkpoint.folders import TEACHER
from neodragon_jax.generation import defaults as generation
from support.benchmark_evidence import NAMES, chain, evidence
from train.benchmark import __main__ as command
from train.benchmark import record, shipping
from train.benchmark import report as benchmark_report
from train.benchmark import run as benchmark
from train.benchmark import targets as benchmark_targets
from train.benchmark.chain import Step
from train.benchmark.continuation import Continuation
from train.benchmark.evaluation import psnr_db, show
from train.benchmark.evidence import GENERATED, GIVEN
from train.benchmark.programs import note_time
from train.benchmark.students import STUDENTS
from train.benchmark.systems import systems
from train.benchmark.targets import Evidence, Target
from train.benchmark.tiers import TIERS
from train.flow.flow_matching import check_unit_weights
from train.shapes.captions import caption, parse
from train.shapes.world import WORLDS, Traits


def start_of(folder: pathlib.Path, tier: str) -> pathlib.Path:
    """Return a checkpoint that a tier continues from: the shipped one, as if it were of the tier's world."""
    root = folder / 'start'
    shutil.copytree(shipped.find('moving_shapes'), root, dirs_exist_ok=True)
    values = shipping.defaults(TIERS[tier], STUDENTS['first_frame'])
    (root / generation.FILE).write_text(json.dumps(values))
    return root


def continuation(tmp_path, tier='cpu') -> Continuation:
    return Continuation(TIERS[tier], tmp_path, 0, shipped.find('moving_shapes'))


@pytest.mark.parametrize('continued', [False, True])
@pytest.mark.parametrize('tier', sorted(TIERS))
def test_every_command_is_understood_by_its_program(tmp_path, tier, continued):
    """Settings exist and have the right types; options are known. Nothing is run."""
    start = start_of(tmp_path, tier) if continued else None
    if (tier, continued) in (('recovery', False), ('cosine', True)):
        with pytest.raises(InputError, match='--start'):
            benchmark.make_chain(tier, tmp_path, 0, start)
        return
    for step in benchmark.make_chain(tier, tmp_path, 0, start).steps():
        if step.arguments[0].startswith('--config='):
            settings = settings_of(step)
            assert settings.workdir.startswith(str(tmp_path)), step.name
        else:
            module = importlib.import_module(step.module)
            if hasattr(module, 'parse_args'):
                module.parse_args(step.arguments)
        assert step.result.is_relative_to(tmp_path)


@pytest.mark.parametrize('continued', [False, True])
@pytest.mark.parametrize('tier', sorted(TIERS))
def test_unit_weights_fit_the_clips_of_their_training(tmp_path, tier, continued):
    """A training with other weights is refused, after the autoencoder and the latents."""
    if (tier, continued) in (('recovery', False), ('cosine', True)):
        return
    start = start_of(tmp_path, tier) if continued else None
    weighted = []
    for step in benchmark.make_chain(tier, tmp_path, 0, start).steps():
        if step.module in ('train.teacher', 'train.pruning', 'train.dmd'):
            settings = settings_of(step)
            section = settings[{'train.teacher': 'teacher', 'train.pruning': 'flow', 'train.dmd': 'dmd'}[step.module]]
            units = 1 if 'still_latents' in settings.get('data', '') else TIERS[tier].units + 1
            check_unit_weights('unit_weights', section.unit_weights, units)
            if section.unit_weights:
                weighted.append(step.name)
                assert section.unit_weights[0] == sum(section.unit_weights[1:]), step.name
    further = continued and tier not in ('one_step', 'recovery')
    assert weighted == (['teacher'] if further or tier == 'vivid' else [])


@pytest.mark.parametrize('tier', sorted(set(TIERS) - {'fast', 'recovery', 'cosine'}))
@pytest.mark.parametrize('continued', [False, True])
def test_rates_decay_over_the_steps_of_their_training(tmp_path, tier, continued):
    start = start_of(tmp_path, tier) if continued else None
    for step in benchmark.make_chain(tier, tmp_path, 0, start).steps():
        if not step.arguments[0].startswith('--config='):
            continue
        settings = settings_of(step)
        section = next(settings[name] for name in ('autoencoder', 'decoder', 'teacher', 'text', 'flow', 'dmd')
                       if not isinstance(settings.get(name, ''), str))  # fmt: skip
        optimizer = section.student if 'student' in section else section.optimizer
        if optimizer.schedule == 'cosine':
            assert optimizer.decay_steps == settings.loop.steps, step.name


def settings_of(step: Step) -> Any:
    """Return the settings of a training program."""
    values = flags.FlagValues()
    given = ['program', *step.arguments]
    config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=given)
    values(given)
    return values['config'].value


def test_a_tier_of_a_size_that_no_pyramid_has_is_refused():
    with pytest.raises(InputError, match='height 96 is not a positive multiple of 64'):
        dataclasses.replace(TIERS['vivid'], height=96)
    with pytest.raises(InputError, match='16 frames'):
        dataclasses.replace(TIERS['cpu'], frames=16)


def test_prompts_are_trained_ones_in_many_words(tmp_path):
    world = WORLDS['cpu']
    benchmark.write_prompts(tmp_path / 'prompts.txt', TIERS['cpu'])
    lines = (tmp_path / 'prompts.txt').read_text().splitlines()
    assert len(lines) > 1000 and len(set(lines)) == len(lines)
    assert not any(world.is_held_out(parse(line)) for line in lines)


@functools.cache
def prompts_of(world: str) -> list[str]:
    return benchmark.prompts_of(WORLDS[world])


@pytest.mark.parametrize('name', sorted(TIERS))
def test_the_sampled_prompts_show_every_trained_caption_equally_often(name):
    """Students learn from the teacher's videos of the first lines, `train.teacher_samples --count`."""
    tier = TIERS[name]
    world, lines = WORLDS[tier.world], prompts_of(tier.world)
    assert len(set(lines)) == len(lines)
    wanted = {caption(world.captioned(traits)) for traits in world.combinations('train')}
    sampled = lines[: tier.samples]
    counts = collections.Counter(caption(told(line)) for line in sampled)
    assert set(counts) <= wanted and len(counts) == min(len(wanted), len(sampled))
    if min(map(len, wordings(lines).values())) * len(wanted) >= len(sampled):
        assert max(counts.values()) - min(counts.values()) <= 1
    if tier.samples >= len(wanted):
        for number, values in enumerate(world.values):
            shown = {told(line)[number] for line in sampled}
            assert shown == ({''} if Traits._fields[number] in world.omitted else set(values))
        last = sum(line.startswith(('on ', 'against ')) for line in sampled)
        assert 0.4 < last / len(sampled) < 0.6
        assert {'small', 'little'} <= {line.split('a ')[-1 if ',' in line else 1].split()[0] for line in sampled}


def test_the_samples_of_the_largest_worlds_show_every_caption_several_times():
    for name in ('vivid', 'gpu'):
        assert TIERS[name].samples >= 4 * len(WORLDS[TIERS[name].world].combinations('train'))


def wordings(lines: list[str]) -> dict[str, list[str]]:
    found = collections.defaultdict(list)
    for line in lines:
        found[caption(told(line))].append(line)
    return found


def told(line: str) -> Traits:
    """Return what a caption tells; '' for a direction that it omits."""
    try:
        return parse(line)
    except InputError:
        with_direction = re.sub('(moves|goes)', r'\1 right', line)
        return parse(with_direction)._replace(direction='', speed='')


def test_drawn_videos_are_what_they_should_be(held_out):
    found = held_out(held_out.drawn)
    assert (
        found['all'].mean == 1 and found['mismatch'].mean < 0.05 and found['motion'].mean == pytest.approx(1, abs=0.03)
    )
    assert all(WORLDS['cpu'].is_held_out(traits) for traits in held_out.expected)
    assert [parse(text) for text in held_out.captions] == held_out.expected
    assert min(psnr_db(held_out.drawn, held_out.drawn)) > 70


def test_still_and_mistaken_videos_are_found_out(held_out):
    still = np.repeat(held_out.drawn[:, :1], held_out.drawn.shape[1], axis=1)
    assert held_out(still)['motion'].mean == pytest.approx(0, abs=0.02) and held_out(still)['direction'].mean == 0
    shifted = np.roll(held_out.drawn, 1, axis=0)
    assert held_out(shifted)['all'].mean < 0.5


BAD = ('student: mismatch over its teacher', 'pruning, stage 2 alone: points lost beyond')


def test_targets(held_out, tmp_path):
    assert set(systems(chain(tmp_path))) == set(NAMES)
    assert set(systems(chain(tmp_path, 'gpu'))) == {*NAMES, 'own_history'}
    seen = evidence(held_out, teacher=0.2, student=0.5)
    verdicts = {
        target.name: target.reached(target.value(seen)) for target in benchmark_targets.targets(chain(tmp_path))
    }
    missed = {name for name, reached in verdicts.items() if reached is False}
    # 0.5 / 0.2; at 1-1-1 it is 0.5 / 1. A perfect stage 2 alone is no worse than both stages.
    assert missed == {name + first for name in BAD for first in ('', ', first frame given')}
    assert verdicts["paper's clean prediction: mismatch over the exact one"] is None
    assert Target('', lambda seen: 0.0, least=1, most=2).bounds == '1 to 2'
    assert Target('', lambda seen: 0.0, most=2).reached(3) is False


def test_report(held_out, tmp_path, monkeypatch):
    run = chain(tmp_path)
    (run.folder / 'teacher').mkdir(parents=True)
    rows = [{'step': step, 'loss': 1 / step} for step in (1, 2, 3)]
    (run.out / 'autoencoder').mkdir()
    for folder in (run.folder / 'teacher', run.out / 'autoencoder'):
        (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    show(run.folder / 'evaluation' / 'drawn.png', held_out.drawn)
    note_time(run.folder / 'times.json', 'teacher', 60.0)
    note_time(run.folder / 'times.json', 'teacher', 1.0)
    monkeypatch.setattr(benchmark_report, 'gather', lambda chain: evidence(held_out, teacher=0.2, student=0.5))
    assert benchmark_report.write([run]) == 2 * len(BAD)
    text = (tmp_path / 'report.md').read_text()
    assert '| student: mismatch over its teacher | at most 1.1 | 2.500 |  | **no**, error unknown |' in text
    assert 'seed-0/curves/teacher.png' in text and '(curves/autoencoder.png)' in text
    assert (tmp_path / 'curves' / 'autoencoder.png').is_file() and '| teacher | 61 |' in text and 'drawn.png' in text
    assert '<td>student: mismatch over its teacher</td>' in (tmp_path / 'report.html').read_text()
    assert json.loads((tmp_path / 'report.json').read_text())['targets']['teacher: color right']['seeds'] == [1.0]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--seeds', 'one'], '--seeds one'),
        (['--until', 'nothing', '--only', 'train'], 'no such step; use one of language, scenes'),
        (['--fast'], 'holds the tier cpu'),
        (['--jobs', '3', '--devices', '2'], '--jobs 3, --devices 2'),
        (['--seeds', '1,0,1'], 'names a seed twice'),
        (['--until', 'teacher', '--only', 'evaluate'], '--until teacher: is for trainings'),
        (['--until', 'teacher', '--only', 'report'], '--until teacher: is for trainings'),
        (['--set', 'teacher:--config.loop.steps=1', '--only', 'report'], 'is for trainings'),
        (['--set', 'teacher'], '--set teacher: write STEP:--config'),
        (['--set', 'techer:--config.loop.steps=1', '--only', 'train'], 'Did you mean "teacher"'),
        (['--set', 'samples:--config.loop.steps=1', '--only', 'train'], 'no such training'),
        (['--set', 'teacher:--config.loop.stops=1', '--only', 'train'], 'stops'),
    ],
)
def test_wrong_options_are_refused(tmp_path, arguments, message):
    record.check_tier(tmp_path, 'cpu')
    with pytest.raises(InputError, match=message):
        benchmark.run(command.read_options(command.parse_args(['--out', str(tmp_path), *arguments])))


@pytest.mark.parametrize(('missed', 'gate', 'status'), [(3, True, 1), (3, False, 0), (0, True, 0)])
def test_a_missed_target_is_the_exit_status_where_that_is_asked_for(monkeypatch, missed, gate, status):
    monkeypatch.setattr(command, 'run', lambda options: missed)
    assert command.main(['--gate'] if gate else []) == status


def test_a_continuation_keeps_all_but_the_denoisers(tmp_path):
    run = continuation(tmp_path)
    steps = {step.name: step for step in run.steps()}
    assert list(steps) == [
        *('stills', 'still_latents', 'scenes', 'latents', 'teacher_stills', 'teacher', 'samples', 'first_frame'),
        'evaluation',
    ]
    kept = {target.name: source for target, source in steps['samples'].parts.items() if target.name != TEACHER}
    assert {source.parent for source in kept.values()} == {run.start} and 'causal_video_vae' in kept
    assert f'--config.teacher.start={run.start / TEACHER}' in steps['teacher_stills'].arguments
    assert f'--config.teacher.start={steps["teacher_stills"].result.parent}' in steps['teacher'].arguments


def test_a_continuation_is_compared_with_its_start(held_out, tmp_path):
    run = continuation(tmp_path)
    perfect = {name: list(value) for name, value in held_out(held_out.drawn).items()}
    named = [f'{name}/{first}' for name in systems(run) for first in (GENERATED, GIVEN)]
    results: dict[str, Any] = dict.fromkeys(['drawn', *named], perfect)
    results['before/generated'] = perfect | {'shape': [0.7, 0.0]}
    results['first_frame/generated'] = perfect | {'shape': [0.6, 0.0]}
    seen = Evidence(results, {}, 0.0, True)
    reached = {target.name: target.reached(target.value(seen)) for target in benchmark_targets.targets(run)}
    missed = [name for name, fine in reached.items() if fine is False]
    assert missed == ['student: shape right', 'student: points of shape gained']


def test_the_shipped_student_is_sampled_as_it_was_distilled():
    student = STUDENTS['first_frame']
    settings = importlib.import_module('configs.dmd').get_config(f'shapes-{student.recipe}').dmd
    assert (settings.student_steps, settings.student_first_steps) == (student.steps, student.first_steps)
    hybrid = shipping.defaults(TIERS['cpu'], student)['modes']['hybrid']  # pyright: ignore[reportIndexIssue]
    assert hybrid == {'first_frame': 'denoiser', 'steps': [1, 1, 1], 'first_steps': [2, 2, 2], 'spacing': 'even'}
    assert shipping.defaults(TIERS['cpu'], STUDENTS['student'])['modes']['hybrid'] == {'first_frame': 'denoiser'}  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize('name', sorted(WORLDS))
def test_shipped_checkpoints_have_the_prompts_of_their_exports(name):
    lists = shipping.prompt_lists(WORLDS[name])
    calibration, evaluation = lists['calibration_prompts.txt'], lists['evaluation_prompts.txt']
    assert len(calibration) >= 12 and len(evaluation) >= 8  # export warns below
    assert len({*calibration, *evaluation}) == len(calibration) + len(evaluation)
    if not WORLDS[name].omitted:
        assert not any(WORLDS[name].is_held_out(parse(text)) for text in calibration)
        assert all(WORLDS[name].is_held_out(parse(text)) for text in evaluation)


@pytest.mark.slow
def test_the_whole_chain_runs(tmp_path):
    """Run every command of the chain with the real programs; the results are noise, but complete."""
    assert command.main(['--fast', '--out', str(tmp_path), '--devices', '2', '--jobs', '2']) == 0
    assert 'student/generated' in (tmp_path / 'report.md').read_text()
    names = {path.name for path in (tmp_path / 'seed-0' / 'moving_shapes').iterdir()}
    assert names == {path.name for path in shipped.find('moving_shapes').iterdir()}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('config.json')}
    assert command.main(['--fast', '--out', str(tmp_path), '--only', 'train']) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob('config.json')}


@pytest.mark.slow
def test_a_continuation_runs_and_can_be_continued(tmp_path):
    """Every command once, from the shipped checkpoint; the result is a checkpoint to start from."""
    start = shipped.find('moving_shapes')
    options = ['--fast', '--start', str(start), '--out', str(tmp_path / 'run'), '--devices', '2']
    assert command.main(options) == 0
    assert '| before/generated |' in (tmp_path / 'run' / 'report.md').read_text()
    made = tmp_path / 'run' / 'seed-0' / 'moving_shapes'
    names = lambda folder: sorted(path.name for path in folder.iterdir())
    assert names(made) == names(start)
    again = ['--fast', '--start', str(made), '--out', str(tmp_path / 'again'), '--devices', '2', '--until', 'teacher']
    assert command.main(again) == 0
