"""A job of two processes, killed repeatedly with SIGKILL, ends with the state of an uninterrupted one, bit for bit.

Everything is real: the launcher, gloo collectives between processes, ArrayRecord files, checkpoints written in the
background. Only the program is small: a two-layer network with dropped inputs, a falling rate, accumulated gradients,
an average and evaluations. Run as a script, this file trains it: `test_kill.py DATA WORKDIR STEPS [DATA FSDP TENSOR]`.
"""

from __future__ import annotations

import json
import pathlib
import random
import re
import shutil
import sys
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from neodragon_jax.base.bucket import StoragePath, is_bucket
from neodragon_jax.base.paths import input_path
from neodragon_jax.base.processes import start_processes
from support.dmd_runs import PROMPTS, sample_arguments, write_pictures
from support.jobs import Job
from train import teacher_samples
from train.data import SampleSource, SampleSpec, SampleWriter
from train.flow.flow_matching import stage_of_step
from train.runtime import loop
from train.runtime.gradients import value_and_grad
from train.runtime.metrics import SPEED, read_metrics
from train.runtime.optimizer import EmaConfig, OptimizerConfig, init_ema, make_optimizer, update_ema
from train.runtime.sharding import MeshConfig, path_name, to_host

SPEC = SampleSpec(latents=(2, 2, 2, 4), text=(2, 4), pooled=16, latents_dtype='float32')
WIDTH, HIDDEN, SAMPLES = 16, 64, 40
CONFIG = OptimizerConfig(1e-2, warmup_steps=10, schedule='cosine', decay_steps=500, final_fraction=0.1)

# --- The program ------------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class RegressionState:
    step: jax.Array
    params: dict
    optimizer: optax.OptState
    ema: object


class Regression:
    """Predicts latents from pooled vectors."""

    name = 'regression'

    def __init__(self, seconds_per_step: float) -> None:
        self.tx, self.seconds_per_step = make_optimizer(CONFIG), seconds_per_step
        self.loss_of_samples = jax.jit(lambda params, batch: self.loss_of(params, batch, None)[0])

    def frozen(self):
        return {}

    def init_state(self, key, frozen):
        del frozen
        kernels = [jax.random.normal(k, (WIDTH, HIDDEN)) / 4 for k in jax.random.split(key)]
        first = {'kernel': kernels[0], 'bias': jnp.zeros(HIDDEN)}
        second = {'kernel': kernels[1].T / 2, 'bias': jnp.zeros(WIDTH)}
        params = {'image_mlp': {'linear_1': first, 'linear_2': second}}
        return RegressionState(jnp.zeros((), jnp.int32), params, self.tx.init(params), init_ema(params))

    def variant(self, step):
        del step
        time.sleep(self.seconds_per_step)
        return 'only'

    def loss_of(self, params, batch, key):
        x = batch['pooled']
        if key is not None:
            x = x * jax.random.bernoulli(key, 0.9, x.shape)
        first, second = (params['image_mlp'][f'linear_{n}'] for n in (1, 2))
        hidden = jnp.tanh(x @ first['kernel'] + first['bias'])
        error = hidden @ second['kernel'] + second['bias'] - batch['latents'].reshape(len(x), -1)[:, :WIDTH]
        return jnp.square(error).mean(), {}

    def train_step(self, variant, state, frozen, batch, key):
        del variant, frozen
        (loss, _), gradient = value_and_grad(self.loss_of, state.params, batch, key, parts=2)
        updates, optimizer = self.tx.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, EmaConfig(0.99))
        return state.replace(params=params, optimizer=optimizer, ema=ema), {
            'loss': loss,
            'grad_norm': optax.global_norm(gradient),
        }

    def evaluate(self, state, frozen, folder):
        del frozen
        params = to_host(state.ema.params)
        rng = np.random.default_rng(9)
        batch = {'pooled': rng.normal(size=(8, WIDTH)).astype(np.float32), 'latents': np.zeros((8, *SPEC.latents))}
        if jax.process_index() == 0:
            np.save(folder / 'bias.npy', params['image_mlp']['linear_2']['bias'])
        return {'size': float(self.loss_of_samples(params, batch))}

    def finish(self, state, folder):
        host = to_host(state)
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            leaves = jax.tree_util.tree_leaves_with_path(host)
            np.savez(folder / 'state.npz', **{path_name(path): leaf for path, leaf in leaves})

    def metadata(self):
        return {}


def train(data: str, workdir: str, steps: int, mesh: tuple[int, int, int], seconds_per_step: float = 0.05) -> None:
    start_processes()
    config = loop.LoopConfig(
        workdir=workdir,
        steps=steps,
        batch_size=16,
        mesh=MeshConfig(*mesh),
        checkpoint_every=4,
        evaluate_every=12,
        keep=2,
        keep_best=1,
        best_metric='eval/size',
        log_every=1,
    )
    loop.run(Regression(seconds_per_step), SampleSource(data), config)


# --- Kills ------------------------------------------------------------------------------------------------------------


def last_checkpoint(workdir: StoragePath) -> int:
    # In a bucket, which renames nothing, a file says that a checkpoint is complete.
    whole = lambda path: path.name.isdigit() and (not is_bucket(path) or (path / 'commit_success.txt').exists())
    return max((int(path.name) for path in (workdir / 'checkpoints').glob('*') if whole(path)), default=0)


def last_step(job: Job) -> int:
    """Return the last step that this job, not one before it, has shown."""
    return max(map(int, re.findall(r'^\[0\] step (\d+) ', job.output, re.MULTILINE)), default=0)


def killed_again_and_again(
    command: list[str], workdir: StoragePath, steps: int, kills: int, logs: pathlib.Path, **options
) -> None:
    """Run a job to its end, killing it `kills` times: one by one its workers and its launcher, once as it starts."""
    chance = random.Random(steps)
    for attempt in range(kills + 1):
        resumed = last_checkpoint(workdir)
        with Job(command, logs / f'{attempt}.txt', **options) as job:
            if attempt == kills:
                assert job.wait() == 0, job.output
            elif attempt == 1:
                job.until(lambda job=job: len(job.workers()) == job.count)
                time.sleep(chance.uniform(0, 3))
                job.kill(chance.randrange(-1, 2))
                continue
            else:
                # At a random step within its own part of the run, so that work remains for every attempt.
                step = max(resumed + 1, round((attempt + chance.random()) * steps / (kills + 1)))
                job.until(lambda job=job, step=step: last_step(job) >= step)
                time.sleep(chance.uniform(0, 0.05))
                job.kill(attempt % 3 - 1)
            if resumed:
                assert f'continuing from the checkpoint of step {resumed}\n' in job.output


def rows_of(workdir: pathlib.Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in SPEED} for row in read_metrics(workdir)]


# --- Tests ------------------------------------------------------------------------------------------------------------

STEPS = 33


def command_of(data, workdir, steps: int, mesh: tuple[int, int, int] = (2, 4, 1)) -> list[str]:
    return [__file__, str(data), str(workdir), str(steps), *map(str, mesh)]


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> pathlib.Path:
    """ArrayRecord files of samples whose latents are a map of their pooled vectors, with noise."""
    folder, rng = tmp_path_factory.mktemp('data'), np.random.default_rng(5)
    matrix = rng.normal(size=(WIDTH, 32)) / 4
    with SampleWriter(folder, SPEC, SAMPLES, protocol={}, samples_per_shard=20) as writer:
        for index in writer.missing():
            pooled = rng.normal(size=WIDTH)
            latents = np.tanh(pooled @ matrix) + 0.1 * rng.normal(size=32)
            text = {'text': np.zeros((2, 4)), 'text_mask': np.ones(2, np.int32), 'prompt': f'sample {index}'}
            writer.append({'index': index, 'pooled': pooled, 'latents': latents.reshape(SPEC.latents)} | text)
    return folder


@pytest.fixture(scope='module')
def unbroken(data, tmp_path_factory) -> pathlib.Path:
    """The folder of an uninterrupted job, of the length that most tests need."""
    return run_unbroken(data, tmp_path_factory.mktemp('unbroken'), STEPS)


def run_unbroken(data: pathlib.Path, folder: pathlib.Path, steps: int) -> pathlib.Path:
    with Job(command_of(data, folder / 'run', steps), folder / 'log.txt') as job:
        assert job.wait() == 0, job.output
    return folder / 'run'


def assert_same_run(workdir: pathlib.Path, unbroken: pathlib.Path) -> None:
    """Compare parameters, optimizer and average bit for bit, and every logged number."""
    with np.load(workdir / 'result' / 'state.npz') as got, np.load(unbroken / 'result' / 'state.npz') as want:
        assert got.files == want.files and len(want.files) > 12
        for name in want.files:
            assert got[name].tobytes() == want[name].tobytes(), name
    assert rows_of(workdir) == rows_of(unbroken)
    assert json.loads((workdir / 'best.json').read_text()) == json.loads((unbroken / 'best.json').read_text())


@pytest.mark.long
def test_killed_job_ends_where_an_unbroken_one_does(data, unbroken, tmp_path):
    killed_again_and_again(command_of(data, tmp_path / 'run', STEPS), tmp_path / 'run', STEPS, 3, tmp_path)
    assert_same_run(tmp_path / 'run', unbroken)


@pytest.mark.long
def test_killed_job_whose_folder_is_in_a_bucket_ends_where_an_unbroken_one_does(data, unbroken, bucket, tmp_path):
    killed_again_and_again(command_of(data, bucket / 'run', STEPS), bucket / 'run', STEPS, 2, tmp_path)
    assert_same_run(input_path(bucket / 'run', 'run'), unbroken)
    assert list((bucket / 'run' / 'tensorboard').iterdir()) and (bucket / 'run' / 'samples' / 'step_000012').is_dir()


@pytest.mark.slow
@pytest.mark.parametrize('place', ['disk', 'bucket'])
def test_job_killed_ten_times_ends_where_an_unbroken_one_does(place, data, bucket, tmp_path):
    steps = 165
    unbroken = run_unbroken(data, tmp_path, steps)
    (tmp_path / 'logs').mkdir()
    workdir = tmp_path / 'killed' if place == 'disk' else bucket / 'killed'
    killed_again_and_again(command_of(data, workdir, steps), workdir, steps, 10, tmp_path / 'logs')
    assert_same_run(input_path(workdir, 'run'), unbroken)


def test_unbroken_job_learns_evaluates_and_keeps_its_best(unbroken):
    rows = read_metrics(unbroken)
    assert [row['step'] for row in rows] == list(range(1, STEPS + 1))
    losses = [row['loss'] for row in rows]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])
    sizes = {row['step']: row['eval/size'] for row in rows if 'eval/size' in row}
    assert list(sizes) == [12, 24, STEPS]
    assert sorted(path.name for path in (unbroken / 'samples').iterdir()) == [f'step_{step:06d}' for step in sizes]
    best = min(sizes, key=lambda step: sizes[step])
    assert json.loads((unbroken / 'best.json').read_text()) == {
        'mode': 'min',
        'best_first': [{'step': best, 'eval/size': sizes[best]}],
    }
    kept = {int(path.name) for path in (unbroken / 'checkpoints').iterdir()}
    assert kept == {best, STEPS - 1, STEPS}


@pytest.mark.parametrize(
    ('processes', 'devices', 'mesh'),
    [
        pytest.param(1, 8, (8, 1, 1), id='1x8', marks=pytest.mark.long),
        pytest.param(4, 2, (2, 2, 2), id='4x2', marks=pytest.mark.slow),
    ],
)
def test_loss_goes_on_with_other_processes(data, unbroken, tmp_path, processes, devices, mesh):
    """Four processes are slow; by default one proves the change of processes, and test_loop.py that of the mesh."""
    shutil.copytree(unbroken, tmp_path / 'run')
    for newest in (STEPS, STEPS - 1):
        shutil.rmtree(tmp_path / 'run' / 'checkpoints' / str(newest))
    resumed = last_checkpoint(tmp_path / 'run')
    assert 12 <= resumed <= STEPS - 9
    with Job(command_of(data, tmp_path / 'run', STEPS, mesh), tmp_path / 'log.txt', processes, devices) as job:
        assert job.wait() == 0, job.output
        assert f'[0] regression: continuing from the checkpoint of step {resumed}\n' in job.output
        assert job.output.count('[0] step ') >= STEPS - resumed
    rows, want = rows_of(tmp_path / 'run'), rows_of(unbroken)
    assert [row.keys() for row in rows] == [row.keys() for row in want]
    for row, expected in zip(rows, want, strict=True):
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-5), (row['step'], name)


@pytest.mark.slow
@pytest.mark.parametrize('place', ['disk', 'bucket'])
def test_step_distillation_killed_ten_times_ends_where_an_unbroken_one_does(place, bucket, tmp_path):
    """The same with the real program: configs/dmd.py:tiny on samples of the miniature teacher.

    All but the first process compile again after each kill, so the seed is one whose steps are all at stage 0.
    """
    steps, seed = 14, 2613373
    assert {stage_of_step(seed, step, 3) for step in range(steps)} == {0}
    (tmp_path / 'prompts.txt').write_text('\n'.join(PROMPTS))
    write_pictures(tmp_path / 'pictures')
    assert teacher_samples.main([*sample_arguments(tmp_path), '--steps', '2', '2', '2']) == 0
    run = {'steps': steps, 'log_every': 1, 'checkpoint_every': 1, 'mesh.data': 2, 'mesh.fsdp': 4}
    settings = [f'--config.seed={seed}', *(f'--config.loop.{name}={value}' for name, value in run.items())]

    killed = tmp_path / 'killed' if place == 'disk' else bucket / 'killed'

    def command(workdir: StoragePath) -> list[str]:
        folders = [f'--config.data={tmp_path / "samples"}', f'--config.workdir={workdir}']
        return ['train.dmd', '--config=configs/dmd.py:tiny', *folders, *settings]

    with Job(command(tmp_path / 'unbroken'), tmp_path / 'unbroken.txt', patience=1800) as job:
        assert job.wait() == 0, job.output
    (tmp_path / 'logs').mkdir()
    logs = tmp_path / 'logs'
    killed_again_and_again(command(killed), killed, steps, 10, logs, patience=1800)
    killed = input_path(killed, 'run')
    files = lambda folder: {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()
    }
    results = [files(folder / 'result') for folder in (killed, tmp_path / 'unbroken')]
    assert any(name.endswith('.safetensors') for name in results[1])
    assert results[0] == results[1]
    # A unit may be absent from a batch; its metrics are then NaN, which is logged as null.
    assert rows_of(killed) == rows_of(tmp_path / 'unbroken')


if __name__ == '__main__':
    train(sys.argv[1], sys.argv[2], int(sys.argv[3]), tuple(map(int, sys.argv[4:7])))
