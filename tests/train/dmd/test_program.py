"""Step distillation as a program, on the miniature checkpoint; its formulas are in test_formulas.py."""

from __future__ import annotations

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from configs import dmd as dmd_settings
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.pyramid.schedule import Schedule
from support.dmd_runs import (
    PROMPTS,
    placed_step,
    sample_arguments,
    settings,
    write_pictures,
)
from support.glossary import unexplained
from support.goldens import TINY_CHECKPOINT, relative_error
from support.training_runs import copy_killed, digests
from train import teacher_samples
from train.data import SampleSource
from train.dmd import program as dmd
from train.dmd.distillation import examples_of
from train.dmd.evaluation import EvaluationConfig
from train.flow.stage_starts import check_stored, start_name
from train.runtime import loop
from train.runtime.metrics import SPEED, read_metrics
from train.runtime.settings import freeze
from train.runtime.sharding import to_host

SCHEDULE, ONE_DEVICE = Schedule(), (1, 1, 1)


# --- The miniature checkpoint -----------------------------------------------------------------------------------------


# With guided random weights the DMD term leads away from the sampled videos, so its weight is small here.
# Adam's epsilon keeps it from turning rounding errors of tiny gradients into full steps.
# The stages of its first four steps are 0 0 2 2, so that each half of a run in two compiles one step.


@pytest.mark.long
def test_teacher_samples_are_resumable(samples, tmp_path):
    shutil.copytree(samples, tmp_path / 'samples')
    (tmp_path / 'prompts.txt').write_text('\n'.join(PROMPTS))
    write_pictures(tmp_path / 'pictures')
    shards = sorted((tmp_path / 'samples').glob('*array_record*'))
    before = [path.read_bytes() for path in shards]
    # As after a killed run: one shard complete, the other missing.
    shards[1].unlink()
    (tmp_path / 'samples' / 'shards' / '00001.json').unlink()
    assert teacher_samples.main(sample_arguments(tmp_path)) == 0
    assert [path.read_bytes() for path in shards] == before
    source = SampleSource(tmp_path / 'samples')
    assert source.spec.latents == (3, 8, 8, 16)
    with pytest.raises(InputError, match=r'hold no start_0, start_1, start_2; make them with .* --store-starts'):
        check_stored(source.spec.arrays, SCHEDULE.stages)
    assert source.protocol['steps'] == [1, 1, 1]
    assert [source[index]['prompt'] for index in range(4)] == [*PROMPTS, PROMPTS[0]]
    # A repeated prompt gives a different video.
    assert relative_error(source[0]['latents'], source[3]['latents']) > 0.1
    assert source[0]['text_mask'].sum() == source[3]['text_mask'].sum()


@pytest.mark.long
def test_teacher_samples_start_from_pictures(tmp_path):
    from PIL import Image

    (tmp_path / 'frames').mkdir()
    for name, color in (('1.png', 'red'), ('2.png', 'blue')):
        Image.new('RGB', (80, 60), color).save(tmp_path / 'frames' / name)
    (tmp_path / 'prompts.txt').write_text('a red wall\na blue wall')
    given = [*sample_arguments(tmp_path), '--first-frame', str(tmp_path / 'frames'), '--count', '8', '--frames', '9']
    assert teacher_samples.main([*given, '--store-starts']) == 0
    source = SampleSource(tmp_path / 'samples')
    first = [source[index]['latents'][0].astype(np.float32) for index in range(4)]
    # The starts of the stages of unit 1; unit 0 is given.
    check_stored(source.spec.arrays, SCHEDULE.stages)
    for stage, side in enumerate((2, 4, 8)):
        starts = source[0][start_name(stage)].astype(np.float32)
        assert starts.shape == (2, side, side, 16)
        assert not np.any(starts[0]) and np.any(starts[1])
    # Samples of one picture differ by the posterior's noise only, those of two pictures by more.
    assert relative_error(first[2], first[0]) < relative_error(first[1], first[0])
    (tmp_path / 'frames' / '2.png').unlink()
    assert teacher_samples.main(given) == 2


@functools.cache
def after_one_step(samples: str, mesh_sizes: tuple[int, int, int]):
    step, begin, frozen, batch, key = placed_step(samples, mesh_sizes)
    carry = begin()
    before = to_host(carry.state)
    carry, metrics = step(carry, frozen, batch, key)
    after = to_host(carry.state)
    # The teacher's buffers outlive the state that was copied from it.
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    moved = {
        name: jax.tree.map(np.subtract, getattr(after, name), getattr(before, name)) for name in ('student', 'fake')
    }
    return to_host(metrics), moved


@pytest.mark.slow
@pytest.mark.parametrize('mesh_sizes', [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_meshes_agree(samples, mesh_sizes):
    """Each mesh is a minute of compiling. The long tests compare (2, 2, 2) with one device in test_whole_recipe.py."""
    want_metrics, want = after_one_step(samples, ONE_DEVICE)
    metrics, moved = after_one_step(samples, mesh_sizes)
    for name, value in want_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, nan_ok=True), name
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        got = functools.reduce(lambda tree, key: tree[key.key], path, moved)
        if np.any(leaf):
            assert relative_error(got, leaf) < 2e-3, path
        else:
            assert not np.any(got), path


@pytest.mark.long
def test_everything_but_positions_is_trained(samples):
    _, moved = after_one_step(samples, ONE_DEVICE)
    for tree in moved.values():
        still = {
            jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if not np.any(leaf)
        }
        # The text query of the last block is unused: it has no gradient, and changes by weight decay only.
        assert {path for path in still if 'text_query' not in path} == {"['positions']"}


@pytest.mark.long
def test_it_learns(samples):
    """On one batch, the student comes to predict the teacher's samples in one step, and the fake model follows."""
    step, begin, frozen, batch, key = placed_step(samples, ONE_DEVICE)
    carry, history = begin(), []
    for _ in range(40):
        carry, metrics = step(carry, frozen, batch, key)
        history.append(to_host(metrics))
    mean = lambda name, rows: np.mean([row[name] for row in rows])
    for name in ('endpoint_mse', 'fake_mse'):
        assert mean(name, history[-5:]) < 0.65 * mean(name, history[:5]), name
    assert mean('cauchy', history[-5:]) < mean('cauchy', history[:5]) - 0.4


@pytest.fixture(scope='module')
def unbroken(samples, tmp_path_factory):
    """A run of four steps of configs/dmd.py:tiny, without interruption. test_whole_recipe.py has one on a mesh."""
    workdir = tmp_path_factory.mktemp('unbroken')
    dmd.RECIPE.run(settings(samples, workdir, steps=4, mesh=ONE_DEVICE))
    return workdir


def test_tiny_settings_train_and_save_a_released_layout(unbroken):
    result = unbroken / 'result'
    module, student = checkpoint.load(result / folders.STUDENT)
    _, teacher = checkpoint.load(TINY_CHECKPOINT / folders.TEACHER)
    assert isinstance(module, PyramidMMDiT)
    assert jax.tree.structure(student) == jax.tree.structure(teacher)
    assert np.array_equal(student['positions'], teacher['positions'])
    assert 1e-4 < relative_error(student['head']['kernel'], teacher['head']['kernel']) < 0.5
    adapters = [
        checkpoint.load(folder)[1] for folder in (result / 'context_adapter', TINY_CHECKPOINT / folders.TEACHER_ADAPTER)
    ]
    assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, adapters), strict=True))
    record = json.loads((result / 'student.json').read_text())
    assert record['protocol'] == '18' and record['clean_prediction'] == 'exact' and record['iterations'] == 4
    rows = read_metrics(unbroken)
    assert [row['step'] for row in rows] == [1, 2, 3, 4]
    assert not unexplained({name for row in rows for name in row})
    for name in ('endpoint_mse', 'cauchy', 'fake_mse', 'teacher_error', 'direction_rms', 'weight', 'student_grad_norm'):
        assert all(np.isfinite(row[name]) for row in rows), name
    assert {name for row in rows for name in row if name.startswith('endpoint_mse/')} == {
        f'endpoint_mse/stage{stage}/unit{unit}' for stage in (0, 2) for unit in (1, 2)
    }


def test_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(samples, unbroken, tmp_path):
    dmd.RECIPE.run(settings(samples, copy_killed(unbroken, 2, tmp_path), steps=4, mesh=ONE_DEVICE))
    assert digests(tmp_path / 'result') == digests(unbroken / 'result')
    rows = [[{**row, **dict.fromkeys(SPEED, 0)} for row in read_metrics(folder)] for folder in (tmp_path, unbroken)]
    assert rows[0] == rows[1]


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_another_objective_does_not_continue_a_run(samples, unbroken):
    """Another protocol needs other samples: test_provenance.py."""
    changed = settings(samples, unbroken, steps=4, mesh=ONE_DEVICE)
    changed.dmd.clean_prediction = 'paper'
    with pytest.raises(InputError, match='clean_prediction = "exact", this run "paper"'):
        dmd.RECIPE.run(changed)


def test_samples_of_another_adapter_are_refused(samples, tmp_path):
    shutil.copytree(TINY_CHECKPOINT, tmp_path / 'other')
    folder = tmp_path / 'other' / folders.TEACHER_ADAPTER
    module, params = checkpoint.load(folder)
    checkpoint.save(folder, module, jax.tree.map(lambda leaf: leaf + 1, params))
    with pytest.raises(InputError, match='context adapter'):
        dmd.RECIPE.run(settings(samples, tmp_path, steps=1, checkpoint=str(tmp_path / 'other')))


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'checkpoint': 'x', 'protocl': '18'}, 'config.protocl: no such setting. Did you mean "protocol"'),
        ({'protocol': '18'}, 'config.checkpoint is missing'),
        ({'checkpoint': 'x', 'protocol': '20'}, "protocol is '20'; use one of 18, 21"),
        (
            {'checkpoint': 'x', 'student': {'learnin_rate': 1}},
            'config.student.learnin_rate: no such setting. Did you mean',
        ),
        ({'checkpoint': 'x', 'objectives': {'matching': {'taus': [0.5, 2.0]}}}, 'taus'),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(InputError, match=message.replace('.', r'\.')):
        freeze(dmd.DMDConfig, values)


def test_more_roll_outs_than_samples_of_a_batch_are_refused():
    config = settings('samples')
    config.loop.batch_size, config.dmd.own_history.videos = 8, 9
    dmd.RECIPE.read(config)
    config.dmd.own_history.last = 0.5
    with pytest.raises(InputError, match=r'own_history\.videos is 9, but config\.loop\.batch_size is 8'):
        dmd.RECIPE.read(config)


def test_weights_that_leave_units_out_in_silence_are_refused():
    examples = lambda weights: examples_of(dmd.DMDConfig(checkpoint='x', unit_weights=weights), 7, SCHEDULE)
    # Unit 0 is given in protocol 18.
    assert examples((1.0,) * 5 + (0.0,)).unit_weights[-1] == 0
    with pytest.raises(InputError, match='clips have 6 trained units: the last 2 would never be trained'):
        examples((1.0,) * 4)


def test_full_settings_are_valid():
    values = dmd_settings.get_config('').to_dict()
    config = freeze(dmd.DMDConfig, values['dmd'] | {'checkpoint': 'x'})
    assert config == dmd.DMDConfig(checkpoint='x', evaluation=EvaluationConfig(videos=8))
    assert freeze(loop.LoopConfig, values['loop'] | {'workdir': 'x', 'updates': config.updates}).steps == 5000
    with pytest.raises(InputError, match='tinny'):
        dmd_settings.get_config('tinny')
