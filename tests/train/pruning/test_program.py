"""Block pruning as commands and as a program, on a denoiser of four blocks of which one adds nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from configs import pruning as pruning_settings
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from support.glossary import unexplained
from support.goldens import relative_error
from support.toy_denoiser import BLOCKS, CHANNELS, GRID, IDENTITY, POOLED, TOKENS, WIDTH, denoiser
from support.training_runs import copy_killed, digests
from train import prune
from train.data import ArraySpec, RecordSpec, SampleSource, SampleWriter
from train.pruning import measurement
from train.pruning import program as pruning
from train.pruning.config import MAPPINGS, PruningConfig
from train.runtime.metrics import read_metrics
from train.runtime.program import LoopConfig
from train.runtime.settings import freeze
from train.runtime.sharding import AXES, make_mesh, put, to_host
from train.runtime.step import abstract_arguments, initial, jit_step
from train.teacher.program import TEACHER, TeacherTraining, load_program

FRAMES, BATCH, COUNT = 2, 8, 24
KEEP = '0,2,3'
# The stages of its first four steps are 0 0 0 0, so that a run compiles one step.
SEED = 41
ALL = ','.join(map(str, range(BLOCKS)))


@pytest.fixture(scope='module')
def full(tmp_path_factory) -> str:
    """The folder of the full denoiser."""
    folder = tmp_path_factory.mktemp('pruning') / 'full'
    checkpoint.save(folder, *denoiser())
    return str(folder)


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> str:
    """A folder of samples with six different prompts."""
    folder, rng = tmp_path_factory.mktemp('pruning') / 'latents', np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    prompts = [{'text': draw(TOKENS, WIDTH), 'pooled': draw(POOLED)} for _ in range(6)]
    mask = np.asarray([1, 1, 0], np.int32)
    arrays = {
        'latents': ArraySpec((FRAMES, GRID, GRID, CHANNELS), 'float32'),
        'text': ArraySpec((TOKENS, WIDTH), 'float32'),
        'text_mask': ArraySpec((TOKENS,), 'int32'),
        'pooled': ArraySpec((POOLED,), 'float32'),
    }
    with SampleWriter(folder, RecordSpec(arrays), COUNT, protocol={'world': 'noise'}) as writer:
        for kind in ('null', 'negative'):
            empty = {name: np.zeros_like(value) for name, value in prompts[0].items()}
            writer.write_conditioning(kind, empty | {'text_mask': mask})
        for index in writer.missing():
            told = prompts[index % 6] | {'text_mask': mask, 'prompt': f'prompt {index % 6}', 'index': index}
            writer.append(told | {'latents': draw(FRAMES, GRID, GRID, CHANNELS)})
    return str(folder)


# --- Choosing and removing blocks -------------------------------------------------------------------------------------


def select_arguments(full: str, data: str, out: Any, *more: str) -> list[str]:
    steps = [*('--steps', '1', '1', '1'), *('--first-steps', '1', '1', '1')]
    given = ['select', '--denoiser', full, '--data', data, '--out', str(out), '--remove', '1', '--candidates', '2']
    sizes = ['--prompts', '4', '--samples', '2', '--check-prompts', '4', '--dtype', 'float32']
    return [*given, *steps, *sizes, *more]


@pytest.mark.long
def test_select_removes_the_block_that_adds_nothing(full, data, tmp_path, monkeypatch, capsys):
    assert prune.main(select_arguments(full, data, tmp_path)) == 0
    told = capsys.readouterr().out
    assert f'keep {KEEP}' in told and 'correlation' in told
    scores = json.loads((tmp_path / 'importance.json').read_text())
    assert scores['order'][0] == IDENTITY
    for stream in ('image', 'text'):
        assert abs(scores[stream][IDENTITY]) < 1e-5 and min(scores[stream][0], scores[stream][2]) > 1e-3
    # Two units at three stages, with the prompt and with the negative one, for eight videos.
    assert scores['text'][-1] is None and scores['calls'] == 2 * 3 * 2 * 8
    choice = json.loads((tmp_path / 'keep.json').read_text())
    assert choice['keep'] == [0, 2, 3] and choice['rounds'][0]['distance'] < 1e-4
    assert max(choice['rounds'][0]['tried'].values()) > 1e-2
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {'importance.json', 'importance.txt', 'importance.svg', 'keep.json', 'record.json'}

    # A second run measures only the full denoiser's videos, which are not stored.
    monkeypatch.setattr(measurement, 'difference', lambda *videos: pytest.fail('measured again'))
    monkeypatch.setattr(measurement.Subject, 'cosines', lambda *tasks: pytest.fail('measured again'))
    monkeypatch.setattr(measurement.Subject, 'videos', lambda self, keep, tasks: np.zeros((len(tasks), 1)))
    assert prune.main(select_arguments(full, data, tmp_path)) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert prune.main(select_arguments(full, data, tmp_path, '--seed', '1')) == 2
    assert 'was begun with seed = 0, not 1' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--prompts', '7'], 'the data have 6 different prompts'),
        (['--check-prompts', '5'], 'give 1 to 4'),
        (['--remove', '4', '--candidates', '4'], 'has 3 removable blocks'),
        (['--samples', '0'], '--samples is 0'),
    ],
)
def test_impossible_selections_are_refused(full, data, tmp_path, capsys, more, message):
    assert prune.main(select_arguments(full, data, tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_applied_keep_list_is_an_ordinary_checkpoint(full, tmp_path, capsys):
    given = ['apply', '--denoiser', full, '--out', str(tmp_path / 'pruned')]
    assert prune.main([*given, '--keep', KEEP]) == 0
    module, params = checkpoint.load(tmp_path / 'pruned')
    assert module.config.num_layers == 3  # pyright: ignore[reportAttributeAccessIssue]
    for place, block in enumerate((0, 2)):
        for name in ('blocks', 'modulators'):
            errors = jax.tree.map(relative_error, params[f'{name}_{place}'], denoiser()[1][f'{name}_{block}'])
            assert max(jax.tree.leaves(errors)) == 0
    assert json.loads((tmp_path / 'pruned' / 'pruning.json').read_text())['keep'] == [0, 2, 3]
    assert prune.main([*given, '--keep', '0,1,2']) == 2
    assert 'cannot be removed' in capsys.readouterr().err


def test_a_denoiser_is_not_overwritten_by_its_pruned_copy(full, tmp_path, capsys):
    own = tmp_path / 'own'
    shutil.copytree(full, own)
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    (tmp_path / 'link').symlink_to(own)
    for out in (own, tmp_path / 'link'):
        assert prune.main(['apply', '--denoiser', str(own), '--out', str(out), '--keep', KEEP]) == 2
        assert 'would be overwritten' in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before


# --- The program ------------------------------------------------------------------------------------------------------


def settings(full: str, data: str, workdir: Any = 'unused', steps: int = 1, mesh=(8, 1, 1), **changes: Any) -> Any:
    config = pruning_settings.get_config('stage2-tiny')
    flow = {'stages': 'one', 'optimizer': {'learning_rate': 1e-3, 'epsilon': 1e-3, 'warmup_steps': 0}}
    flow |= {'ema_decay': 0.5, 'evaluation': {'examples': 8, 'batch': 8, 'samples': 0}}
    run = {'steps': steps, 'batch_size': BATCH, 'mesh': dict(zip(AXES, mesh, strict=True)), 'log_every': 1}
    run |= {'checkpoint_every': 2, 'evaluate_every': 0}
    config.update({'denoiser': full, 'keep': KEEP, 'data': data, 'seed': SEED, 'workdir': str(workdir)})
    config.update({'flow': flow, 'loop': run})
    config.update(changes)
    return config


def program_of(config: Any) -> tuple[pruning.Pruning, Any, LoopConfig]:
    program, source, run = pruning.RECIPE.load(pruning.RECIPE.read(config))
    assert isinstance(program, pruning.Pruning)
    return program, source, run


@functools.cache
def placed_step(full: str, data: str, mesh: tuple[int, int, int]):
    """Return (step of stage 0, function to the first carry, frozen, batch, key) of stage 2 on a mesh."""
    # The teacher's random weights do not fit the random data, so the loss follows the teacher alone.
    matching = {'stage': 2, 'data_weight': 0.0}
    program, source, run = program_of(settings(full, data, mesh=mesh, pruning=matching))
    frozen = program.frozen()
    abstract = abstract_arguments(program, frozen, source, run, make_mesh(run.mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    frozen = put(frozen, shardings.frozen)
    begin = jax.jit(functools.partial(initial, program), out_shardings=shardings.carry)
    rows = [source[index] for index in range(BATCH)]
    batch = put({name: np.stack([row[name] for row in rows]) for name in abstract.batch}, shardings.batch)
    key = jax.device_put(jax.random.key(1), shardings.root_key)
    return jit_step(program, (0,), abstract), lambda: begin(jax.random.key(0), frozen), frozen, batch, key


@pytest.mark.slow
def test_meshes_agree(full, data):
    results = []
    for mesh in ((1, 1, 1), (2, 2, 2)):
        step, begin, frozen, batch, key = placed_step(full, data, mesh)
        carry, metrics = step(begin(), frozen, batch, key)
        results.append((to_host(metrics), to_host(carry.state.params)))
    (want_metrics, want), (metrics, params) = results
    for name, value in want_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name
    assert max(jax.tree.leaves(jax.tree.map(relative_error, params, want))) < 2e-3
    assert {f'{stream}/block{block}' for stream, blocks in (('image', '023'), ('text', '02')) for block in blocks} == {
        name for name in metrics if '/block' in name
    }


def test_it_learns(full, data):
    """The pruned block added nothing, so the loss starts at 0; after a perturbation, training reduces it."""
    step, begin, frozen, batch, key = placed_step(full, data, (1, 1, 1))
    carry = begin()
    assert to_host(step(begin(), frozen, batch, key)[1])['image'] < 1e-8
    disturb = lambda path, leaf: leaf * 1.2 if 'image_out' in jax.tree_util.keystr(path) else leaf
    params = jax.tree_util.tree_map_with_path(disturb, carry.state.params)
    carry = carry.replace(state=carry.state.replace(params=params))
    history = []
    for _ in range(40):
        carry, metrics = step(carry, frozen, batch, key)
        history.append(to_host(metrics))
        again = put(np.int32(0), carry.state.step.sharding)  # the random numbers depend on the step
        carry = carry.replace(state=carry.state.replace(step=again))
    mean = lambda name, rows: np.mean([row[name] for row in rows])
    assert history[0]['image'] > 1e-3
    for name in ('loss', 'image'):
        assert mean(name, history[-5:]) < 0.6 * mean(name, history[:3]), name


@pytest.mark.long
@pytest.mark.parametrize('mapping', MAPPINGS)
def test_an_unpruned_copy_has_nothing_to_match(full, data, mapping):
    """With all blocks, both mappings match each block with itself; they differ before a removed block."""
    weights = {'stage': 2, 'mapping': mapping, 'data_weight': 0.0}
    for keep, matches in ((ALL, True), ('0,1,3', False)):
        program, _, _ = program_of(settings(full, data, keep=keep, pruning=weights))
        rows = [SampleSource(data)[index] for index in range(BATCH)]
        batch = {name: np.stack([row[name] for row in rows]) for name in ('latents', 'text', 'text_mask', 'pooled')}
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), program.frozen())
        loss_of = jax.jit(functools.partial(program.matching, (0,)))
        loss, (parts, _) = loss_of(params['teacher'], params['start'], batch, jax.random.key(0))
        assert (float(loss) < 1e-6) == matches
        # Before the removed block, everything equals the teacher.
        assert float(parts['image'][0]) < 1e-8 < float(parts['data'])
        if not matches:
            assert (float(parts['image'][1]) < 1e-8) == (mapping == 'simple')


def test_targets():
    assert pruning.targets((0, 1, 2, 3), 'next') == pruning.targets((0, 1, 2, 3), 'simple') == [0, 1, 2]
    assert pruning.targets((0, 2, 5), 'simple') == [0, 2]
    assert pruning.targets((0, 2, 5), 'next') == [1, 4]
    assert pruning.targets((3,), 'next') == []


@pytest.mark.long
def test_both_stages_run_and_resume(full, data, tmp_path):
    """Stage 1, and stage 2 from its result, in one go and in two."""
    first = {'stage': 1}
    pruning.RECIPE.run(settings(full, data, tmp_path / 'first', steps=2, pruning=first))
    start = tmp_path / 'first' / 'result' / TEACHER
    assert checkpoint.load_module(start).config.num_layers == 3  # pyright: ignore[reportAttributeAccessIssue]
    second = functools.partial(settings, full, data, steps=4, start=str(start))
    pruning.RECIPE.run(second(tmp_path / 'unbroken'))
    pruning.RECIPE.run(second(copy_killed(tmp_path / 'unbroken', 2, tmp_path / 'broken')))
    assert digests(tmp_path / 'broken' / 'result') == digests(tmp_path / 'unbroken' / 'result')
    rows = read_metrics(tmp_path / 'unbroken')
    assert not unexplained({name for row in rows for name in row})
    assert all(np.isfinite([row[name] for row in rows for name in ('loss', 'image', 'text', 'output', 'data')]))
    record = json.loads((tmp_path / 'unbroken' / 'result' / 'teacher.json').read_text())
    assert record['pruning']['keep'] == [0, 2, 3] and record['pruning']['mapping'] == 'simple'
    changed = settings(full, data, tmp_path / 'unbroken', steps=4, start=str(start), keep='0,1,3')
    with pytest.raises(InputError, match='keep'):
        pruning.RECIPE.run(changed)
    with pytest.raises(InputError, match='of 3 blocks, the keep list makes a PyramidMMDiT of 4'):
        program_of(settings(full, data, start=str(start), keep=ALL))


def test_stage_1_is_the_teacher_s_training(full, data, tmp_path):
    """The program is train.teacher's on the pruned denoiser: the same loss for the same batch."""
    program, _, _ = program_of(settings(full, data, pruning={'stage': 1}))
    assert 'teacher' not in program.frozen()
    prune.main(['apply', '--denoiser', full, '--out', str(tmp_path / 'pruned'), '--keep', KEEP])
    config = dataclasses.replace(program.config, start=str(tmp_path / 'pruned'))
    teacher, _ = load_program(config, [data], [1.0])
    assert type(teacher) is TeacherTraining and teacher.module == program.module
    for got, want in zip(jax.tree.leaves(program.start), jax.tree.leaves(teacher.start), strict=True):
        assert np.array_equal(got, want)
    assert type(program).loss is TeacherTraining.loss


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'stage': 3}, 'stage is 3'),
        ({'mapping': 'last'}, "mapping is 'last'; use one of simple, next"),
        ({'text_weight': -1.0}, 'text_weight is -1.0'),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        freeze(PruningConfig, {'denoiser': 'x', 'keep': '0'} | values)


def test_presets():
    for preset, stage, steps in (('stage1', 1, 300), ('stage2', 2, 60_000), ('stage1-tiny', 1, 60)):
        config = pruning_settings.get_config(preset)
        assert (config.pruning.stage, config.loop.steps) == (stage, steps)
        config.update({'denoiser': 'x', 'keep': '0', 'data': 'x', 'workdir': 'x'})
        pruning.RECIPE.read(config)
    with pytest.raises(InputError, match='stage3'):
        pruning_settings.get_config('stage3')
    with pytest.raises(InputError, match=r'config\.denoiser is empty'):
        pruning.RECIPE.run(pruning_settings.get_config())
