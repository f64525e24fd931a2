"""The teacher: its loss on a denoiser in closed form, and the program on a world of four patterns."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import teacher as teacher_settings
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint import folders
from neodragon_jax.config.neodragon import MMDiTConfig
from neodragon_jax.models.context_adapter import ContextAdapter
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.models.teacher import TeacherMMDiT
from neodragon_jax.pyramid import stages as pyramid
from neodragon_jax.pyramid.history import envelope_frame_ids
from neodragon_jax.pyramid.sampler import Prompt
from neodragon_jax.pyramid.schedule import Schedule
from support.goldens import relative_error
from support.training_runs import copy_killed, digests
from train.data import ArraySpec, RecordSpec, SampleSource, SampleWriter
from train.flow import flow_matching, losses
from train.runtime.metrics import read_metrics
from train.runtime.settings import freeze
from train.runtime.sharding import AXES, make_mesh, put, to_host
from train.runtime.step import abstract_arguments, initial, jit_step
from train.teacher import program as teacher
from train.teacher.evaluation import SAMPLES, motion

SCHEDULE = Schedule()
# --- The program ------------------------------------------------------------------------------------------------------

FRAMES, GRID, CHANNELS, TOKENS, TEXT, POOLED, KINDS = 2, 8, 4, 3, 12, 6, 4
BATCH = 8
# The stages of its first four steps are 0 0 0 0, so that a run compiles one step.
SEED = 41
SIZES = {
    'num_layers': 2,
    'num_attention_heads': 2,
    'attention_head_dim': 16,
    'caption_projection_dim': 32,
    'joint_attention_dim': TEXT,
    'pooled_projection_dim': POOLED,
    'in_channels': CHANNELS,
    'sample_size': GRID,
    'pos_embed_max_size': GRID,
}
EVALUATION = {'examples': 8, 'batch': 8, 'samples': 2}


def record(rng: np.random.Generator, kind: int, image: bool) -> dict[str, Any]:
    """Return a sample whose caption names its pattern; the second frame is the first one flipped."""
    pattern = np.random.default_rng(kind).standard_normal((2, 2, CHANNELS))
    first = np.repeat(np.repeat(pattern, GRID // 2, 0), GRID // 2, 1) + 0.1 * rng.standard_normal(
        (GRID, GRID, CHANNELS)
    )
    second = np.zeros_like(first) if image else -first
    text = np.zeros((TOKENS, TEXT))
    text[:, kind] = 1
    return {
        'latents': np.stack([first, second]).astype(np.float32),
        'units': np.int32(1 if image else 2),
        't5': text.astype(np.float32),
        'text_mask': np.asarray([1, 1, 0], np.int32),
        'pooled': text[0, :POOLED].astype(np.float32),
    }


def write(folder, samples: list[dict[str, Any]]) -> None:
    """Write samples as train.latents does."""
    arrays = {name: ArraySpec(value.shape, str(value.dtype)) for name, value in samples[0].items()}
    with SampleWriter(folder, RecordSpec(arrays), len(samples), protocol={'world': 'patterns'}) as writer:
        nothing = {name: np.zeros_like(samples[0][name]) for name in ('t5', 'pooled')}
        writer.write_conditioning('null', nothing | {'text_mask': np.asarray([1, 0, 0], np.int32)})
        for index in writer.missing():
            writer.append(samples[index] | {'index': index, 'prompt': f'sample {index}'})


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> str:
    """A folder of 40 samples, every third one an image."""
    folder, rng = tmp_path_factory.mktemp('teacher') / 'latents', np.random.default_rng(0)
    write(folder, [record(rng, index % KINDS, index % 3 == 0) for index in range(40)])
    return str(folder)


def settings(data: str, workdir='unused', steps: int = 1, mesh=(8, 1, 1), embedder: bool = True, **changes):
    config = teacher_settings.get_config('tiny')
    objective = {'sizes': SIZES, 'context_embedder': embedder, 'stages': 'one', 'evaluation': EVALUATION}
    objective |= {'optimizer': {'learning_rate': 4e-3}}
    run = {'steps': steps, 'batch_size': BATCH, 'mesh': dict(zip(AXES, mesh, strict=True)), 'log_every': 1}
    run |= {'checkpoint_every': 100, 'evaluate_every': 0}
    config.update({'data': data, 'seed': SEED, 'workdir': str(workdir), 'teacher': objective, 'loop': run})
    config.update(changes)
    return config


@functools.cache
def program_for(data: str, **options) -> teacher.TeacherTraining:
    values = settings(data).teacher.to_dict() | options
    return teacher.load_program(freeze(teacher.TeacherConfig, values), [data], [1.0])[0]


def raw_batch(data: str) -> dict[str, np.ndarray]:
    """Return the first samples as the loader gives them."""
    rows = [SampleSource(data)[index] for index in range(BATCH)]
    return {name: np.stack([row[name] for row in rows]) for name in (*rows[0].keys() - {'prompt'},)}


def example_batch(data: str) -> dict[str, jax.Array]:
    """Return them as the objective takes them."""
    batch = raw_batch(data)
    arrays = {name: batch[name] for name in ('latents', 'units')} | program_for(data).prompts(batch)
    return jax.tree.map(jnp.asarray, arrays)


class PointMass:
    """The exact flow where all data are `params['point']`: [1, T, H, W, C], a frame for each unit."""

    def __call__(self, variables, clips, text, mask, pooled, timestep, frame_ids):
        del text, mask, pooled
        x, unit = clips[-1], frame_ids[:, -1]
        stage = {GRID >> (2 - stage): stage for stage in range(3)}[x.shape[2]]
        first, last = SCHEDULE.timestep_limits[stage]
        level = (timestep - last) / (first - last)
        clean = pyramid.down(variables['params']['point'][0], 2 - stage)[unit][:, None]
        start, end = pyramid.stage_pair(clean, jnp.zeros_like(x), stage, SCHEDULE)
        sigma = losses.per_sample(SCHEDULE.sigma(stage, level), x)
        length = float(SCHEDULE.start_sigmas[stage] - SCHEDULE.end_sigmas[stage])
        return length * (x - losses.interpolate(start, end, level)) / sigma + start - end


def test_the_true_flow_has_no_loss(data, monkeypatch):
    """If the data are one point the flow is known: it equals the teacher's target at every unit and stage."""
    program = program_for(data)
    monkeypatch.setattr(program, 'apply', PointMass())
    point = jax.random.normal(jax.random.key(0), (1, FRAMES, GRID, GRID, CHANNELS))
    batch = {**example_batch(data), 'latents': jnp.broadcast_to(point, (BATCH, *point.shape[1:]))}
    loss_of = jax.jit(functools.partial(program.loss, (0, 1, 2)))
    loss, sums = loss_of({'point': point}, batch, jax.random.key(1))
    wrong, _ = loss_of({'point': point + 1}, batch, jax.random.key(1))
    assert float(loss) < 1e-4 < 0.1 < float(wrong)
    # Images have no second frame.
    images = int(np.sum(batch['units'] == 1))
    assert images and all(0 < sums[stage][1, 1] <= BATCH - images for stage in range(3))


def test_a_dropped_caption_is_the_null_prompt_whole(data, monkeypatch):
    program, batch, seen = program_for(data, caption_dropout=0.5), example_batch(data), []

    def spy(variables, clips, *prompt_and_rest):
        del variables
        seen.append([np.asarray(part) for part in prompt_and_rest[:3]])
        return clips[-1]

    monkeypatch.setattr(program, 'apply', spy)
    with jax.disable_jit():
        for seed in range(8):
            program.loss((0,), {}, batch, jax.random.key(seed))
    names, dropped = ('text', 'text_mask', 'pooled'), []
    for prompt in seen:
        for row in range(BATCH):
            own, null = (
                all(np.array_equal(part[row], want) for part, want in zip(prompt, wanted, strict=True))
                for wanted in ([batch[name][row] for name in names], [program.null[name] for name in names])
            )
            assert own != null
            dropped.append(null)
    assert len(dropped) == 64 and 0.3 < np.mean(dropped) < 0.7


@functools.cache
def placed_step(data: str, mesh_sizes: tuple[int, int, int], stages: tuple[int, ...]):
    """Return (step, first carry, batch, key) on a mesh."""
    program, source, run = teacher.load(teacher.RECIPE.read(settings(data, mesh=mesh_sizes)))
    abstract = abstract_arguments(program, {}, source, run, make_mesh(run.mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    begin = jax.jit(functools.partial(initial, program), out_shardings=shardings.carry)
    raw = raw_batch(data) | {'source': np.zeros(BATCH, np.int32)}
    batch = put({name: raw[name] for name in abstract.batch}, shardings.batch)
    key = jax.device_put(jax.random.key(1), shardings.root_key)
    return jit_step(program, stages, abstract), functools.partial(begin, jax.random.key(0), {}), batch, key


def test_meshes_agree(data):
    results = []
    for mesh_sizes in ((1, 1, 1), (2, 2, 2)):
        step, begin, batch, key = placed_step(data, mesh_sizes, (0,))
        carry, first = step(begin(), {}, batch, key)
        # Fresh gates are zero: only the second step's gradient passes through the blocks.
        carry, second = step(carry, {}, batch, key)
        results.append(to_host((first, second, carry.state.params)))
    *want_metrics, want = results[0]
    for *metrics, params in results[1:]:
        for got_step, want_step in zip(metrics, want_metrics, strict=True):
            for name, value in want_step.items():
                assert got_step[name] == pytest.approx(value, rel=1e-4, nan_ok=True), name
        errors = jax.tree.map(relative_error, params, want)
        assert max(jax.tree.leaves(errors)) < 2e-3


def test_it_learns_and_leaves_the_positions(data):
    """On samples of four kinds, identified by their captions, at the stage where both units are one token."""
    step, begin, batch, key = placed_step(data, (1, 1, 1), (0,))
    carry, history = begin(), []
    positions = np.asarray(carry.state.params['positions'])
    for _ in range(200):
        carry, metrics = step(carry, {}, batch, key)
        history.append(to_host(metrics))
    mean = lambda name, rows: np.nanmean([row[name] for row in rows])
    for name in ('loss', 'stage0/unit0', 'stage0/unit1'):
        assert mean(name, history[-40:]) < 0.5 * mean(name, history[:10]), name
    assert np.array_equal(carry.state.params['positions'], positions)
    # The average lags behind the parameters.
    average = carry.state.ema.params['head']['kernel']
    assert 0.001 < relative_error(average, carry.state.params['head']['kernel']) < 0.5


@pytest.fixture(scope='module')
def unbroken(data, tmp_path_factory):
    """A run of four steps, evaluated at its end, without interruption."""
    workdir = tmp_path_factory.mktemp('unbroken')
    config = settings(data, workdir, steps=4, mesh=(1, 1, 1))
    config.loop.update({'evaluate_every': 4, 'checkpoint_every': 2})
    teacher.RECIPE.run(config)
    return workdir


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
