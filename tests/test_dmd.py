"""Step distillation: its formulas on a denoiser in closed form, and the program on the miniature checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDENS, TINY_CHECKPOINT, channels_last, load_golden, relative_error
from flax import traverse_util

from configs import dmd as dmd_settings
from configs import freeze
from neodragon_jax import checkpoint, pyramid
from neodragon_jax.config import MMDiTConfig
from neodragon_jax.errors import InputError
from neodragon_jax.models.mmdit import PyramidMMDiT, stack_blocks
from neodragon_jax.names.mmdit import mmdit_names
from neodragon_jax.schedule import Schedule
from train import dmd, loop, losses, packing, teacher_samples
from train.data import SampleSource
from train.metrics import read_metrics
from train.sharding import AXES, make_mesh, put, to_host

SCHEDULE = Schedule()
FRAMES, GRID, CHANNELS, BATCH = 3, 8, 16, 8
PROMPTS = ('a red ball', 'a blue cube', 'a cat')


# --- A denoiser whose distribution is one point -----------------------------------------------------------------------


class PointMass:
    """The exact flow of data that are always `params['point']`, moved by the mean of the pooled prompt."""

    def apply(self, variables, clips, text, mask, pooled, timestep, frame_ids):
        del text, mask, frame_ids
        x = clips[-1]
        stage = {GRID >> (2 - stage): stage for stage in range(3)}[x.shape[2]]
        first, last = SCHEDULE.timestep_limits[stage]
        level = losses.per_sample((timestep - last) / (first - last), x)
        clean = pyramid.down(variables['params']['point'], 2 - stage) + losses.per_sample(pooled.mean(axis=1), x)
        start, end = pyramid.stage_pair(clean, jnp.zeros_like(x), stage, SCHEDULE)
        mean = level * start + (1 - level) * end
        sigma = losses.per_sample(SCHEDULE.sigma(stage, level[:, 0, 0, 0, 0]), x)
        length = float(SCHEDULE.start_sigmas[stage] - SCHEDULE.end_sigmas[stage])
        return length * (x - mean) / sigma + start - end


def point(seed: int) -> dict[str, jax.Array]:
    return {'point': jax.random.normal(jax.random.key(seed), (1, 1, GRID, GRID, CHANNELS))}


def make_batch(pooled_scale: float = 1.0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return {
        'latents': draw(BATCH, FRAMES, GRID, GRID, CHANNELS),
        'text': draw(BATCH, 4, 8),
        'text_mask': jnp.ones((BATCH, 4), jnp.int32),
        'pooled': pooled_scale * draw(BATCH, 6),
    }


def point_program(monkeypatch=None, **options) -> dmd.DMD:
    """Return the program with the closed-form denoiser in place of the network."""
    config = dmd.DMDConfig(checkpoint=str(TINY_CHECKPOINT), dtype='float32', remat='none', **options)
    negative = {
        'text': np.zeros((4, 64), np.float32),
        'text_mask': np.ones(4, np.int32),
        'pooled': np.ones(6, np.float32),
    }
    program = dmd.DMD(config, negative, FRAMES)
    program.module = PointMass()  # pyright: ignore[reportAttributeAccessIssue]
    program.negative = program.negative._replace(text=np.zeros((4, 8), np.float32))  # pyright: ignore[reportArgumentType]
    program.teacher = point(0)
    return program


@pytest.mark.parametrize('stage', range(3))
def test_student_gradient_is_the_definition(stage):
    options = {'protocol': '21', 'student_steps': 4, 'guidance': 3.0, 'first_guidance': 7.0}
    program, batch, key = point_program(**options), make_batch(), jax.random.key(5)
    student, fake, frozen = point(1), point(2), program.frozen()
    gradient = jax.grad(program.student_loss, has_aux=True)(student, fake, frozen, stage, batch, key)[0]

    example_key, tau_key, noise_key = jax.random.split(key, 3)
    example, z_theta = program.predict(student, stage, batch, example_key)
    tau = jax.random.choice(tau_key, jnp.asarray(program.config.student_taus), (BATCH,))
    probe = program.probe(z_theta, stage, tau, noise_key)
    flow = lambda params, pooled: PointMass().apply({'params': params}, [probe.x], 0, 0, pooled, probe.timestep, 0)
    negative, positive = flow(program.teacher, jnp.ones((BATCH, 6))), flow(program.teacher, batch['pooled'])
    scale = np.where(np.asarray(example.unit) == 0, 7.0, 3.0).reshape(-1, 1, 1, 1, 1)
    assert set(np.asarray(example.unit)) >= {0, 1}
    teacher_flow = negative + scale * (positive - negative)
    weight = 1 / np.abs(teacher_flow - probe.flow).sum(axis=(1, 2, 3, 4), keepdims=True)
    error = z_theta - example.clean
    cauchy_slope = 2 * error / (1 + jnp.sum(error**2, axis=(1, 2, 3, 4), keepdims=True))
    slope = weight * (teacher_flow - flow(fake, batch['pooled'])) + 0.5 * cauchy_slope
    _, pull_back = jax.vjp(lambda params: program.predict(params, stage, batch, example_key)[1], student)
    assert relative_error(gradient['point'], pull_back(slope / BATCH)[0]['point']) < 1e-5


def test_only_the_student_gets_a_gradient():
    program, batch, key = point_program(), make_batch(), jax.random.key(5)
    surrogate = lambda *args: program.student_loss(*args, 1, batch, key)[0]
    frozen = {'teacher': program.teacher, 'negative': program.negative}
    gradients = jax.grad(surrogate, argnums=(0, 1, 2), allow_int=True)(point(1), point(2), frozen)
    assert np.any(gradients[0]['point'])
    assert not np.any(gradients[1]['point'])
    assert not np.any(gradients[2]['teacher']['point'])
    fake_loss = lambda fake, student: program.fake_loss(fake, student, 1, batch, key)
    gradients = jax.grad(fake_loss, argnums=(0, 1))(point(2), point(1))
    assert np.any(gradients[0]['point'])
    assert not np.any(gradients[1]['point'])


@pytest.mark.parametrize('stage', range(3))
def test_distribution_matching_alone_finds_the_teacher(stage):
    """Student and fake model start at another point than the teacher's, and nothing but the DMD term moves them."""
    rate = dmd.OptimizerConfig(learning_rate=0.03, betas=(0.0, 0.95), weight_decay=0.0)
    program = point_program(student=rate, fake=rate, cauchy_weight=0.0)
    state = program.init_state(jax.random.key(0), program.frozen()).replace(student=point(1), fake=point(1))
    at_stage = lambda params: pyramid.down(params['point'], 2 - stage)
    distance = lambda a, b: float(jnp.linalg.norm(at_stage(a) - at_stage(b)))
    before = distance(state.student, program.teacher)
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), make_batch(pooled_scale=0.0))
    frozen = program.frozen() | {'negative': jax.tree.map(jnp.zeros_like, program.negative)}
    step = jax.jit(functools.partial(program.train_step, stage))
    for key in jax.random.split(jax.random.key(1), 100):
        state, _ = step(state, frozen, batch, key)
    assert distance(state.student, program.teacher) < 0.1 * before
    assert distance(state.student, state.fake) < 0.1 * before


@pytest.mark.parametrize(('protocol', 'units'), [('18', {1, 2}), ('21', {0, 1, 2})])
def test_draws_cover_every_unit(protocol, units):
    program, batch = point_program(protocol=protocol), make_batch()
    seen = set()
    for seed in range(5):
        example = program.example(1, batch, jax.random.key(seed))
        seen |= set(np.asarray(example.unit).tolist())
        for row, unit in enumerate(np.asarray(example.unit)):
            latents = batch['latents'][row : row + 1]
            assert relative_error(example.clean[row], pyramid.down(latents, 1)[0, unit : unit + 1]) < 1e-6
            want = pyramid.history(latents[:, :unit], 1, 3)
            for clip, frame in zip(reversed(want), reversed(example.history), strict=False):
                assert relative_error(frame[row, -1:], clip[0, -1:]) < 1e-6
    assert seen == units


def test_draws_cover_every_stage_evenly():
    program = point_program(seed=3)
    counts = np.bincount([program.variant(step) for step in range(3000)], minlength=3)
    assert counts.min() > 900
    assert [program.variant(step) for step in range(20)] != [point_program(seed=4).variant(step) for step in range(20)]


def test_levels_of_a_student_with_several_steps():
    """The student is asked only where it will be used: at the levels of its own schedule."""
    program, seen = point_program(student_steps=4), set()
    apply = program.module.apply
    program.module = dataclasses.make_dataclass('Spy', ['apply'])(  # pyright: ignore[reportAttributeAccessIssue]
        lambda *args: seen.update(np.asarray(args[-2]).round(3).tolist()) or apply(*args)
    )
    with jax.disable_jit():
        for seed in range(4):
            program.predict(point(1), 1, make_batch(), jax.random.key(seed))
    assert seen == set(
        np.float32(SCHEDULE.timestep(1, jnp.asarray(SCHEDULE.steps(1, 4).levels[:-1]))).round(3).tolist()
    )


@pytest.mark.parametrize('scan', [False, True])
def test_packed_sequence_equals_a_call_per_stage(scan):
    golden = load_golden('dit_a')
    config = MMDiTConfig.from_json(json.loads((GOLDENS / 'dit_a' / 'config.json').read_text()), 'dit_a')
    tensors = safetensors.numpy.load_file(GOLDENS / 'dit_a' / 'model.safetensors')
    flat = {entry.path: jnp.asarray(entry.convert.to_flax(tensors[entry.torch_name])) for entry in mmdit_names(config)}
    params = traverse_util.unflatten_dict(flat)
    params = stack_blocks(params, config.num_layers) if scan else params
    calls = []
    for stage in range(3):
        names = [name for name in golden if name.startswith(f'packed3/in/stage{stage}_clip')]
        clips = [jnp.asarray(channels_last(golden[name])) for name in names]
        inputs = (golden[f'packed3/in/{name}'][stage::3] for name in ('text', 'text_mask', 'pooled', 'timestep'))
        frames = sum(clip.shape[1] for clip in clips)
        calls.append(packing.Call(clips, *map(jnp.asarray, inputs), jnp.broadcast_to(jnp.arange(frames), (2, frames))))
    run = jax.jit(lambda params, calls: packing.packed_flows(PyramidMMDiT(config, scan=scan), params, calls))
    for stage, flow in enumerate(run(params, calls)):
        assert relative_error(flow, channels_last(golden[f'packed3/out_stage{stage}'])) < 2e-5


# --- The miniature checkpoint -----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def samples(tmp_path_factory) -> str:
    """A folder of 16 teacher samples."""
    folder = tmp_path_factory.mktemp('dmd')
    (folder / 'prompts.txt').write_text('\n'.join(PROMPTS))
    assert teacher_samples.main(sample_arguments(folder)) == 0
    return str(folder / 'samples')


def sample_arguments(folder) -> list[str]:
    return [
        *('--checkpoint', str(TINY_CHECKPOINT), '--prompts-file', str(folder / 'prompts.txt')),
        *('--out', str(folder / 'samples'), '--count', '16', '--samples-per-shard', '8'),
        *('--frames', '17', '--height', '64', '--width', '64'),
        *('--steps', '1', '1', '1', '--first-steps', '1', '1', '1', '--dtype', 'float32'),
    ]


# Guided random weights believe in other videos than those they sample, and the DMD term leads there: little of it here.
# Adam's epsilon keeps it from turning rounding errors of tiny gradients into full steps.
OPTIMIZER = {'learning_rate': 3e-3, 'epsilon': 1e-3}
OBJECTIVE = {'cauchy_weight': 10.0, 'student': OPTIMIZER, 'fake': OPTIMIZER}
# The stages of its first four steps are 0 0 2 2, so that each half of a run in two compiles one step.
SEED = 39


def settings(samples: str, workdir='unused', steps: int = 1, mesh: tuple[int, int, int] = (8, 1, 1), **changes):
    config = dmd_settings.get_config('tiny')
    given = {'checkpoint': str(TINY_CHECKPOINT), 'data': samples, 'workdir': str(workdir), 'seed': SEED}
    run = {'steps': steps, 'log_every': 1, 'checkpoint_every': 2, 'mesh': dict(zip(AXES, mesh, strict=True))}
    config.update(given | {'dmd': OBJECTIVE, 'loop': run} | changes)
    return config


def test_teacher_samples_are_resumable(samples, tmp_path):
    shutil.copytree(samples, tmp_path / 'samples')
    (tmp_path / 'prompts.txt').write_text('\n'.join(PROMPTS))
    shards = sorted((tmp_path / 'samples').glob('*array_record*'))
    before = [path.read_bytes() for path in shards]
    # As a killed run leaves them: one shard complete, the other not there.
    shards[1].unlink()
    (tmp_path / 'samples' / 'shards' / '00001.json').unlink()
    assert teacher_samples.main(sample_arguments(tmp_path)) == 0
    assert [path.read_bytes() for path in shards] == before
    source = SampleSource(tmp_path / 'samples')
    assert source.spec.latents == (3, 8, 8, 16)
    assert source.protocol['steps'] == [1, 1, 1]
    assert [source[index]['prompt'] for index in range(4)] == [*PROMPTS, PROMPTS[0]]
    # The same prompt again is another video.
    assert relative_error(source[0]['latents'], source[3]['latents']) > 0.1
    assert source[0]['text_mask'].sum() == source[3]['text_mask'].sum()


def test_teacher_samples_start_from_pictures(tmp_path):
    from PIL import Image

    (tmp_path / 'frames').mkdir()
    for name, colour in (('a.png', 'red'), ('b.png', 'blue')):
        Image.new('RGB', (80, 60), colour).save(tmp_path / 'frames' / name)
    (tmp_path / 'prompts.txt').write_text('a red wall\na blue wall')
    given = [*sample_arguments(tmp_path), '--first-frame', str(tmp_path / 'frames'), '--count', '8', '--frames', '9']
    assert teacher_samples.main(given) == 0
    first = [SampleSource(tmp_path / 'samples')[index]['latents'][0].astype(np.float32) for index in range(4)]
    # Samples of one picture differ by the posterior's noise only, those of two pictures by more.
    assert relative_error(first[2], first[0]) < relative_error(first[1], first[0])
    (tmp_path / 'frames' / 'b.png').unlink()
    assert teacher_samples.main(given) == 2


@functools.cache
def placed_step(samples: str, mesh_sizes: tuple[int, int, int]):
    """Return (step, function to the first carry, frozen, batch, key) of stage 2 on a mesh."""
    config, run, data = dmd.read_settings(settings(samples, mesh=mesh_sizes))
    source, mesh = SampleSource(data), make_mesh(run.mesh)
    program = dmd.load_program(config, source)
    abstract = loop.abstract_arguments(program, program.frozen(), source, run, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    frozen = put(program.frozen(), shardings.frozen)
    begin = lambda frozen: loop.Carry(
        program.init_state(jax.random.key(0), frozen), jnp.zeros((), int), jnp.zeros((), int)
    )
    carry = functools.partial(jax.jit(begin, out_shardings=shardings.carry), frozen)
    rows = [source[index] for index in range(BATCH)]
    batch = {name: np.stack([np.stack([row[name] for row in rows])] * 3) for name in abstract.batch}
    key = jax.device_put(jax.random.key(1), shardings.root_key)
    return loop.jit_step(program, 2, abstract), carry, frozen, put(batch, shardings.batch), key


@functools.cache
def after_one_step(samples: str, mesh_sizes: tuple[int, int, int]):
    step, begin, frozen, batch, key = placed_step(samples, mesh_sizes)
    carry = begin()
    before = to_host(carry.state)
    carry, metrics = step(carry, frozen, batch, key)
    after = to_host(carry.state)
    # The teacher's buffers outlive the state that began as its copy.
    assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
    moved = {
        name: jax.tree.map(np.subtract, getattr(after, name), getattr(before, name)) for name in ('student', 'fake')
    }
    return to_host(metrics), moved


@pytest.mark.parametrize('mesh_sizes', [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_meshes_agree(samples, mesh_sizes):
    want_metrics, want = after_one_step(samples, (1, 1, 1))
    metrics, moved = after_one_step(samples, mesh_sizes)
    for name, value in want_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, nan_ok=True), name
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        got = functools.reduce(lambda tree, key: tree[key.key], path, moved)
        if np.any(leaf):
            assert relative_error(got, leaf) < 2e-3, path
        else:
            assert not np.any(got), path


def test_everything_but_positions_is_trained(samples):
    _, moved = after_one_step(samples, (1, 1, 1))
    for tree in moved.values():
        still = {
            jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if not np.any(leaf)
        }
        # In the last block the text's query is read by nobody: no gradient, and with it no change but weight decay's.
        assert {path for path in still if 'text_query' not in path} == {"['positions']"}


def test_it_learns(samples):
    """On one batch, the student comes to predict the teacher's samples in one step, and the fake model follows."""
    step, begin, frozen, batch, key = placed_step(samples, (1, 1, 1))
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
    """A run of four steps of configs/dmd.py:tiny, without interruption."""
    workdir = tmp_path_factory.mktemp('unbroken')
    dmd.main(settings(samples, workdir, steps=4))
    return workdir


def digests(folder) -> dict[str, str]:
    files = [path for path in folder.rglob('*') if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_tiny_settings_train_and_save_a_released_layout(unbroken):
    result = unbroken / 'result'
    module, student = checkpoint.load(result / dmd.STUDENT)
    _, teacher = checkpoint.load(TINY_CHECKPOINT / teacher_samples.TEACHER)
    assert isinstance(module, PyramidMMDiT)
    assert jax.tree.structure(student) == jax.tree.structure(teacher)
    assert np.array_equal(student['positions'], teacher['positions'])
    assert 1e-4 < relative_error(student['head']['kernel'], teacher['head']['kernel']) < 0.5
    adapters = [
        checkpoint.load(folder)[1] for folder in (result / 'context_adapter', TINY_CHECKPOINT / dmd.TEACHER_ADAPTER)
    ]
    assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, adapters), strict=True))
    record = json.loads((result / 'student.json').read_text())
    assert record['protocol'] == '18' and record['clean_prediction'] == 'exact' and record['iterations'] == 4
    rows = read_metrics(unbroken)
    assert [row['step'] for row in rows] == [1, 2, 3, 4]
    for name in ('endpoint_mse', 'cauchy', 'fake_mse', 'teacher_error', 'direction_rms', 'weight', 'student_grad_norm'):
        assert all(np.isfinite(row[name]) for row in rows), name
    assert {name for row in rows for name in row if name.startswith('endpoint_mse/')} == {
        f'endpoint_mse/stage{stage}/unit{unit}' for stage in (0, 2) for unit in (1, 2)
    }


def test_resumed_run_ends_bit_for_bit_where_an_unbroken_one_does(samples, unbroken, tmp_path):
    dmd.main(settings(samples, tmp_path, steps=2))
    dmd.main(settings(samples, tmp_path, steps=4))
    assert digests(tmp_path / 'result') == digests(unbroken / 'result')
    timing = 'steps_per_second'
    rows = [[{**row, timing: 0} for row in read_metrics(folder)] for folder in (tmp_path, unbroken)]
    assert rows[0] == rows[1]


# --- Refusals ---------------------------------------------------------------------------------------------------------


def test_another_protocol_does_not_continue_a_run(samples, unbroken):
    changed = settings(samples, unbroken, steps=4)
    changed.dmd.protocol = '21'
    with pytest.raises(InputError, match='protocol = "18", this run "21"'):
        dmd.main(changed)


def test_samples_of_another_adapter_are_refused(samples, tmp_path):
    shutil.copytree(TINY_CHECKPOINT, tmp_path / 'other')
    folder = tmp_path / 'other' / teacher_samples.TEACHER_ADAPTER
    module, params = checkpoint.load(folder)
    checkpoint.save(folder, module, jax.tree.map(lambda leaf: leaf + 1, params))
    with pytest.raises(InputError, match='context adapter'):
        dmd.main(settings(samples, tmp_path, steps=1, checkpoint=str(tmp_path / 'other')))


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
        ({'checkpoint': 'x', 'student_taus': [0.5, 2.0]}, 'student_taus'),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(InputError, match=message.replace('.', r'\.')):
        freeze(dmd.DMDConfig, values)


def test_full_settings_are_valid():
    values = dmd_settings.get_config('').to_dict()
    config = freeze(dmd.DMDConfig, values['dmd'] | {'checkpoint': 'x'})
    assert config == dmd.DMDConfig(checkpoint='x')
    assert freeze(loop.LoopConfig, values['loop'] | {'workdir': 'x', 'updates': config.updates}).steps == 5000
    with pytest.raises(InputError, match='tinny'):
        dmd_settings.get_config('tinny')
