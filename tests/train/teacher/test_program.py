"""The training of the teacher as a program: runs, results, evaluation, and refusals."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.models.teacher import TeacherMMDiT
from neodragon_jax.pyramid.history import envelope_frame_ids
from neodragon_jax.pyramid.sampler import Prompt
from support.glossary import unexplained
from support.goldens import relative_error
from support.teacher_runs import (
    BATCH,
    CHANNELS,
    FRAMES,
    GRID,
    KINDS,
    SCHEDULE,
    TEXT,
    TOKENS,
    example_batch,
    program_for,
    record,
    settings,
    write,
)
from support.training_runs import copy_killed, digests
from train.flow import flow_matching, losses
from train.runtime.metrics import read_metrics
from train.runtime.settings import freeze
from train.teacher import program as teacher
from train.teacher.evaluation import SAMPLES, motion


@pytest.fixture(scope='module')
def unbroken(data, tmp_path_factory):
    """A run of four steps, evaluated at its end, without interruption."""
    workdir = tmp_path_factory.mktemp('unbroken')
    config = settings(data, workdir, steps=4, mesh=(1, 1, 1))
    config.loop.update({'evaluate_every': 4, 'checkpoint_every': 2})
    teacher.RECIPE.run(config)
    return workdir


@pytest.mark.long
def test_resumed_run_ends_where_an_unbroken_one_does(data, unbroken, tmp_path):
    teacher.RECIPE.run(settings(data, copy_killed(unbroken, 2, tmp_path), steps=4, mesh=(1, 1, 1)))
    assert digests(tmp_path / 'result') == digests(unbroken / 'result')


def test_results_are_in_both_layouts(unbroken, data):
    result = unbroken / 'result'
    whole, params = checkpoint.load(result / folders.PYRAMID_FLOW)
    assert isinstance(whole, TeacherMMDiT) and whole.config.joint_attention_dim == TEXT
    denoiser, denoiser_params = checkpoint.load(result / folders.TEACHER)
    assert type(denoiser) is PyramidMMDiT and isinstance(denoiser.config, MMDiTConfig)
    adapter, adapter_params = checkpoint.load(result / folders.TEACHER_ADAPTER)
    assert isinstance(adapter, ContextAdapter)
    # Adapter and denoiser in sequence equal the whole model.
    batch = example_batch(data)
    rest = (batch['text_mask'], batch['pooled'], np.linspace(0, 1000, BATCH, dtype=np.float32))
    clips = [batch['latents'][:, :1], batch['latents'][:, 1:]]
    text = adapter.apply({'params': adapter_params}, batch['text'])
    got = jax.jit(denoiser.apply)({'params': denoiser_params}, clips, text, *rest)
    want = jax.jit(whole.apply)({'params': params}, clips, batch['text'], *rest)
    assert relative_error(got, want) < 2e-5 and float(jnp.std(want)) > 0
    record = json.loads((result / 'teacher.json').read_text())
    assert record['iterations'] == 4 and record['sizes']['class'] == 'PyramidDiffusionMMDiT'
    data = record['data']
    assert data['protocols'] == [{'world': 'patterns'}] and data['latents'] == [[FRAMES, GRID, GRID, CHANNELS]]


def test_evaluation(unbroken, data):
    """The logged numbers are those of the result, and the samples come from its guided denoiser."""
    row = [row for row in read_metrics(unbroken) if 'eval/validation' in row][-1]
    assert not unexplained(row)
    program = program_for(data)
    assert program.evaluation is not None
    module, params = checkpoint.load(unbroken / 'result' / folders.PYRAMID_FLOW)
    held_out = program.evaluation.held_out
    prompt = Prompt(held_out['text'], held_out['text_mask'], held_out['pooled'])
    stage, units = 1, jnp.full(8, 1)
    key = jax.random.fold_in(jax.random.key(0), 0)
    draws = flow_matching.draw(key, stage, held_out['latents'].shape, units + 1, SCHEDULE)._replace(unit=units)
    example = flow_matching.build(stage, jnp.asarray(held_out['latents']), draws, SCHEDULE)
    ids = envelope_frame_ids(units, FRAMES - 1)
    clips = [*example.history, example.x]
    flow = jax.jit(module.apply)({'params': params}, clips, *prompt, example.timestep, ids)
    errors = np.asarray(losses.squared_error(flow, example.flow))[held_out['units'] == 2]
    assert row['eval/validation/stage1/unit1'] == pytest.approx(errors.mean(), rel=1e-4)
    parts = [row[f'eval/validation/stage{stage}/unit{unit}'] for stage in range(3) for unit in range(2)]
    assert row['eval/validation'] == pytest.approx(np.mean(parts), rel=1e-6)
    latents = np.load(unbroken / 'samples' / 'step_000004' / SAMPLES)['latents']
    assert latents.shape == (2, FRAMES, GRID, GRID, CHANNELS) and np.isfinite(latents).all()
    real = held_out['latents'][held_out['units'] == 2]
    assert row['eval/sample/motion'] == pytest.approx(motion(latents) / motion(real), rel=1e-5)


def test_going_on_from_a_result(data, unbroken, tmp_path):
    """A run that starts from a released folder returns it unchanged after zero steps."""
    start = unbroken / 'result' / folders.PYRAMID_FLOW
    program = program_for(data, start=str(start))
    program.finish(program.init_state(jax.random.key(0), program.frozen()), tmp_path)
    before, after = (checkpoint.load(folder)[1] for folder in (start, tmp_path / folders.PYRAMID_FLOW))
    assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (before, after)), strict=True))


def test_pictures_and_videos_mix(data, tmp_path):
    """Pictures have one frame on disk; they are padded, and held out alongside."""
    rng = np.random.default_rng(1)
    samples = [record(rng, index % KINDS, True) for index in range(8)]
    for sample in samples:
        sample['latents'] = sample['latents'][:1]
    write(tmp_path, samples)
    config = freeze(teacher.TeacherConfig, settings(data).teacher.to_dict())
    program, source = teacher.load_program(config, [data, str(tmp_path)], [3.0, 1.0])
    assert program.evaluation is not None
    assert list(program.evaluation.held_out['units'][4:]) == [1] * 4
    assert program.evaluation.held_out['latents'].shape == (8, FRAMES, GRID, GRID, CHANNELS)
    units = [int(source[index]['units']) for index in range(len(source))]
    assert len(units) == 48 and units[36:] == [1] * 12 and 2 in units[:36]
    with pytest.raises(InputError, match='2 folders of data, 1 weights'):
        teacher.load_program(config, [data, str(tmp_path)], [1.0])


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_dry_run_needs_no_data(capsys):
    config = settings('')
    config.blank_sample = {'frames': FRAMES, 'height': GRID, 'width': GRID, 'text_tokens': TOKENS}
    teacher.RECIPE.run(config, dry_run=True)
    assert f'batch  t5  [8, {TOKENS}, {TEXT}]  bfloat16' in capsys.readouterr().out


def test_data_that_do_not_fit_are_refused(data):
    config = settings(data)
    config.teacher.sizes.joint_attention_dim = 13
    with pytest.raises(InputError, match=f'text states are {TEXT} wide, the denoiser takes 13'):
        teacher.RECIPE.run(config)
    config = settings(data)
    config.teacher.evaluation = {**config.teacher.evaluation.to_dict(), 'examples': 40}
    with pytest.raises(InputError, match='40 samples are to be held out of 40'):
        teacher.RECIPE.run(config)
    with pytest.raises(InputError, match=r'config\.data is empty'):
        teacher.RECIPE.run(settings(''))


@pytest.mark.parametrize('dry_run', [False, True])
def test_weights_that_leave_units_out_in_silence_are_refused(data, dry_run):
    config = settings('' if dry_run else data)
    config.blank_sample.frames = FRAMES
    config.teacher.unit_weights = (1.0,) * (FRAMES - 1)
    with pytest.raises(InputError, match=f'clips have {FRAMES} trained units: the last 1 would never be trained'):
        teacher.RECIPE.run(config, dry_run=dry_run)
