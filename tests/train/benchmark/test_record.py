"""What a folder of the benchmark was made with is recorded; another tier, start or setting is refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable

import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import shipped
from neodragon_jax.checkpoint.folders import TEACHER, TEACHER_ADAPTER
from neodragon_jax.generation import defaults as generation
from train.benchmark import record
from train.benchmark import run as benchmark
from train.benchmark.chain import Chain, Step
from train.benchmark.programs import Programs
from train.benchmark.run import make_chain

SHORTER = '--config.loop.steps=7'


@pytest.fixture(name='start')
def _start(tmp_path) -> pathlib.Path:
    """A checkpoint to start from, which a test may change."""
    return pathlib.Path(shutil.copytree(shipped.find('moving_shapes'), tmp_path / 'start'))


def change(path: pathlib.Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize('tier', ['cpu', 'fast', 'one_step', 'recovery', 'collapse'])
def test_tiers_that_continue_from_the_shipped_checkpoint(tmp_path, start, tier):
    make_chain(tier, tmp_path, 0, start)


@pytest.mark.parametrize('tier', ['gpu', 'vivid'])
def test_a_start_of_another_world_is_refused(tmp_path, start, tier):
    with pytest.raises(InputError, match=f'is of world cpu; tier {tier} continues from {tier}'):
        make_chain(tier, tmp_path, 0, start)
    change(start / generation.FILE, world=tier)
    if tier == 'vivid':
        with pytest.raises(InputError, match='makes videos of 64x64; tier vivid has 128x128'):
            make_chain(tier, tmp_path, 0, start)
    with pytest.raises(InputError, match=f'world {tier}; tier collapse continues from collapse or cpu'):
        make_chain('collapse', tmp_path, 0, start)


def test_a_start_without_a_world_is_refused(tmp_path, start):
    (start / generation.FILE).write_text('{}')
    with pytest.raises(InputError, match='does not name the world of its training'):
        make_chain('cpu', tmp_path, 0, start)


def test_the_teacher_of_the_recovery_is_as_wide_as_the_text_states_of_its_start(tmp_path, start):
    def sizes() -> set[str]:
        steps = make_chain('recovery', tmp_path, 0, start).steps()
        return {one for step in steps if step.name == 'teacher' for one in step.arguments if 'sizes.' in one}

    assert {
        '--config.teacher.sizes.num_attention_heads=3',
        '--config.teacher.sizes.caption_projection_dim=96',
    } < sizes()
    change(start / TEACHER_ADAPTER / 'config.json', output_dims=128)
    assert '--config.teacher.sizes.caption_projection_dim=128' in sizes()
    change(start / TEACHER_ADAPTER / 'config.json', output_dims=100)
    with pytest.raises(InputError, match='text states are 100 wide'):
        sizes()


def test_the_start_is_recorded_and_another_one_refused(tmp_path, start):
    out = tmp_path / 'out'
    record.check_tier(out, 'one_step', start)
    assert (out / record.TIER).read_text() == f'one_step, continued\nstart: {record.identity(start)} {start}\n'
    moved = start.rename(tmp_path / 'moved')
    record.check_tier(out, 'one_step', moved)
    assert record.recorded_start(out).endswith(str(start))
    change(moved / TEACHER / 'config.json', sample_size=16)
    with pytest.raises(InputError, match=f'begun from another checkpoint, {start}'):
        record.check_tier(out, 'one_step', moved)
    with pytest.raises(InputError, match='holds the tier one_step, continued, not one_step;'):
        record.check_tier(out, 'one_step')


def test_records_of_older_versions_stay(tmp_path, start):
    for written, options in (('collapse, continued\n', ('collapse', start)), ('cpu\n', ('cpu', None))):
        (tmp_path / record.TIER).write_text(written)
        record.check_tier(tmp_path, *options)
        assert (tmp_path / record.TIER).read_text() == written and record.recorded_start(tmp_path) == ''


@pytest.fixture(name='chain')
def _chain(tmp_path) -> Chain:
    return make_chain('cpu', tmp_path / 'out', 0, None)


def begin(step: Step) -> None:
    """Leave what a training leaves that was stopped."""
    step.result.parent.parent.parent.mkdir(parents=True, exist_ok=True)


def finish(*steps: Step) -> None:
    for step in steps:
        step.result.parent.mkdir(parents=True, exist_ok=True)
        step.result.write_text('{}')


def named(chain: Chain, name: str) -> Step:
    return next(step for step in chain.steps() if step.name == name)


def test_a_setting_is_given_to_its_training_and_recorded(chain):
    changes = record.read_changes([f'stage2:{SHORTER}', 'stage2:--config.seed=3'])
    steps = record.changed(chain.steps(), changes)
    assert [step.name for step in steps if SHORTER in step.arguments] == ['stage2']
    record.record_changes([chain], steps, changes)
    assert record.recorded_changes(chain.out) == {'seed-0/stage2': [SHORTER, '--config.seed=3']}


def test_a_training_that_began_keeps_its_settings(chain):
    steps, stage2 = chain.steps(), named(chain, 'stage2')
    changes = {'stage2': [SHORTER]}
    record.record_changes([chain], steps, changes)
    begin(stage2)
    record.record_changes([chain], steps, changes)
    for other in ({}, {'stage2': ['--config.loop.steps=8']}):
        with pytest.raises(InputError, match=f'was begun with {SHORTER}; --set has to say the same'):
            record.record_changes([chain], steps, other)
    finish(*steps[: steps.index(stage2) + 1])
    record.record_changes([chain], steps, {})
    assert record.recorded_changes(chain.out) == {'seed-0/stage2': [SHORTER]}
    with pytest.raises(InputError, match='was begun with unchanged settings'):
        begin(named(chain, 'stage1'))
        record.record_changes([chain], steps, {'stage1': [SHORTER]})


def test_what_was_made_from_an_earlier_result_has_to_go(chain):
    """In a copy of a folder without one training, those that learned from it are still there."""
    steps = chain.steps()
    finish(*(step for step in steps if step.name != 'text'))
    with pytest.raises(InputError, match='remove them') as error:
        record.record_changes([chain], steps, {'text': [SHORTER]})
    assert to_remove(error) == [chain.folder / name for name in ('teacher_samples', 'student', 'regression', 'paper')]


def to_remove(error: pytest.ExceptionInfo[InputError]) -> list[pathlib.Path]:
    """Return the folders that a message says to remove."""
    folders = str(error.value).partition('remove them: ')[2].removesuffix('.').split(', ')
    return [pathlib.Path(folder) for folder in folders]


@pytest.fixture(name='refused')
def _refused(monkeypatch) -> Callable[..., list[pathlib.Path]]:
    """A function from a chain and options of a training that is refused to the folders to remove."""
    monkeypatch.setattr(Programs, 'run', lambda self, step, *_: pytest.fail(f'{step.name} was run'))

    def train(chain: Chain, step: str, until: str | None, changes: record.Changes) -> list[pathlib.Path]:
        options = benchmark.Options(chain.out, 'cpu', None, (chain.seed,), 'train', until, 1, 1, changes)
        with pytest.raises(InputError, match=f'/{step}: has no result, but these were made from an earlier') as error:
            benchmark.train([chain], options)
        return to_remove(error)

    return train


@pytest.mark.parametrize('until', [None, 'text'])
@pytest.mark.parametrize('changes', [{'text': [SHORTER]}, {}])
def test_stale_readers_are_found_beyond_the_last_step_and_without_a_change(chain, refused, until, changes):
    """A step that is not asked for now reads the old result later, when nothing tells it from the new one."""
    finish(*(step for step in chain.steps() if step.name != 'text'))
    assert len(refused(chain, 'text', until, changes)) == 4


def test_seeds_that_are_not_asked_for_read_the_steps_that_all_share(chain, refused):
    other = dataclasses.replace(chain, seed=12)
    finish(*other.steps())
    shutil.rmtree(chain.out / 'decoder')
    assert refused(chain, 'decoder', 'decoder', {})[0] == other.folder / 'teacher_samples'


def test_a_training_that_began_without_a_change_may_be_continued_beside_its_readers(chain):
    """It ends with the result that it had, as in a folder whose results an older version kept elsewhere."""
    finish(*(step for step in chain.steps() if step.name != 'text'))
    begin(named(chain, 'text'))
    record.record_changes([chain], chain.steps(), {})
