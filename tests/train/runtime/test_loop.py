"""The training loop, on a toy program: a two-layer network that starts as its frozen teacher and learns a linear map.

Run as a script it trains in the given folder until it is stopped: the process that the SIGTERM tests end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from neodragon_jax.base.errors import InputError
from support import goldens
from support.jobs import Job
from support.toy_program import (
    HIDDEN,
    WIDTH,
    LinearSource,
    Toy,
    checkpoint_steps,
    config_for,
    traces,
)
from train.runtime import loop
from train.runtime.loop import run
from train.runtime.metrics import read_metrics
from train.runtime.optimizer import OptimizerConfig
from train.runtime.profiler import STEPS_ON_SIGNAL, note_requests
from train.runtime.sharding import MeshConfig, to_host


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, to_host(a), to_host(b))


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    """A run without incidents: (folder, state)."""
    folder = tmp_path_factory.mktemp('unbroken')
    return folder, run(Toy(), LinearSource(), config_for(folder))


def test_learns_and_logs(tmp_path):
    state = run(Toy(), LinearSource(), config_for(tmp_path, steps=120, log_every=20, checkpoint_every=1000))
    rows = read_metrics(tmp_path)
    assert [row['step'] for row in rows] == [20, 40, 60, 80, 100, 120]
    assert rows[-1]['loss_of_variant_0'] < 0.1 * rows[0]['loss_of_variant_0']
    assert rows[-1]['skipped'] == 0
    assert int(state.step) == 120
    assert list((tmp_path / 'tensorboard').iterdir())
    np.testing.assert_array_equal(
        np.load(tmp_path / 'result' / 'bias.npy'), np.asarray(state.student['image_mlp']['linear_2']['bias'])
    )


def test_state_lives_in_its_shardings(unbroken):
    kernel = unbroken[1].student['image_mlp']['linear_1']['kernel']
    assert kernel.sharding.spec == PartitionSpec('fsdp', 'tensor')
    moment = unbroken[1].optimizer[0].mu['image_mlp']['linear_1']['kernel']
    assert moment.sharding == kernel.sharding


def test_resumed_run_equals_unbroken_one_bit_for_bit(unbroken, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Toy(stop_before=8), LinearSource(), config_for(tmp_path))
    assert checkpoint_steps(tmp_path) == [5]
    assert_equal(run(Toy(), LinearSource(), config_for(tmp_path)), unbroken[1])
    rows, expected = read_metrics(tmp_path), read_metrics(unbroken[0])
    assert [row['step'] for row in rows] == [row['step'] for row in expected] == [4, 8, 12]
    assert rows[-1]['loss'] == expected[-1]['loss']


def test_finished_run_is_not_run_again(unbroken, capsys):
    folder, state = unbroken
    before = checkpoint_steps(folder)
    assert_equal(run(Toy(stop_before=0), LinearSource(), config_for(folder)), state)
    assert checkpoint_steps(folder) == before
    assert 'compiling' not in capsys.readouterr().out


def test_longer_run_goes_on_from_the_end_on_another_mesh(unbroken, tmp_path):
    longer = run(Toy(), LinearSource(), config_for(tmp_path / 'whole', steps=16))
    run(Toy(), LinearSource(), config_for(tmp_path / 'parts', mesh=MeshConfig(1, 8, 1)))
    resumed = run(Toy(), LinearSource(), config_for(tmp_path / 'parts', steps=16, mesh=MeshConfig(4, 1, 2)))
    assert int(resumed.seen) == int(longer.seen)
    _assert_close(resumed.student, longer.student)


@pytest.mark.parametrize('sizes', [(1, 1, 1), (8, 1, 1), (1, 8, 1)])
def test_meshes_agree(unbroken, tmp_path, sizes):
    state = run(Toy(), LinearSource(), config_for(tmp_path, mesh=MeshConfig(*sizes)))
    assert int(state.seen) == int(unbroken[1].seen)
    _assert_close(state.student, unbroken[1].student)


def _assert_close(a, b):
    errors = jax.tree.map(goldens.relative_error, to_host(a), to_host(b))
    assert max(jax.tree.leaves(errors)) < 1e-5


def test_updates_stack_different_batches(tmp_path):
    state = run(Toy(), LinearSource(), config_for(tmp_path, updates=3, steps=2))
    other = run(Toy(), LinearSource(), config_for(tmp_path / 'other', batch_size=24, steps=2))
    assert int(state.seen) == int(other.seen)


@dataclasses.dataclass(frozen=True)
class TwoOptimizers:
    student: OptimizerConfig = OptimizerConfig()
    fake: OptimizerConfig = OptimizerConfig(kind='muon')


def test_other_program_or_data_order_is_refused(tmp_path):
    run(Toy(), LinearSource(), config_for(tmp_path, steps=2))
    with pytest.raises(InputError, match=r'flavor = "plain", this run "bitter"; choose another workdir'):
        run(Toy(flavor='bitter'), LinearSource(), config_for(tmp_path, steps=3))
    with pytest.raises(InputError, match='seed = 0, this run 1'):
        run(Toy(), LinearSource(), config_for(tmp_path, steps=3, seed=1))
    with pytest.raises(InputError, match='samples = 40, this run 41'):
        run(Toy(), LinearSource(41), config_for(tmp_path, steps=3))
    other = LinearSource()
    other.identity = 'f00d'
    with pytest.raises(InputError, match='content of the samples = "", this run "f00d"'):
        run(Toy(), other, config_for(tmp_path, steps=3))
    with_muon = Toy()
    with_muon.config = TwoOptimizers()
    with pytest.raises(InputError, match=r'optimizers = \{\}, this run \{"student": "adamw", "fake": "muon"\}'):
        run(with_muon, LinearSource(), config_for(tmp_path, steps=3))
    with pytest.raises(InputError, match=r'at step 2 already, beyond config\.loop\.steps = 1; raise it'):
        run(Toy(), LinearSource(), config_for(tmp_path, steps=1))


def test_steps_that_are_not_finite_change_nothing(unbroken, tmp_path):
    clean = run(Toy(), LinearSource(), config_for(tmp_path / 'clean', steps=4))
    skipping = run(Toy(poison=(4, 5, 6)), LinearSource(), config_for(tmp_path / 'skipping', steps=7, log_every=1))
    assert int(skipping.step) == 7
    assert_equal(skipping.replace(step=clean.step), clean)
    rows = read_metrics(tmp_path / 'skipping')
    assert [row['skipped'] for row in rows] == [0, 0, 0, 0, 1, 2, 3]
    assert rows[-1]['loss'] is None
    healed = run(Toy(poison=(4, 5, 6)), LinearSource(), config_for(tmp_path / 'skipping', steps=9, log_every=1))
    assert read_metrics(tmp_path / 'skipping')[-1]['skipped_in_a_row'] == 0
    assert float(healed.optimizer[0].count) == 6


def test_diverged_run_stops_with_its_last_good_state(tmp_path):
    settings = {'max_skips': 3, 'log_every': 1, 'checkpoint_every': 100}
    clean = run(Toy(), LinearSource(), config_for(tmp_path / 'clean', steps=4))
    with pytest.raises(loop.DivergedError, match=r'step 7: the last 3 steps .* Lower the learning rate'):
        run(Toy(poison=tuple(range(4, 99))), LinearSource(), config_for(tmp_path / 'bad', **settings))
    assert checkpoint_steps(tmp_path / 'bad') == [7]
    restored = run(Toy(stop_before=0), LinearSource(), config_for(tmp_path / 'bad', steps=7, **settings))
    assert_equal(restored.student, clean.student)
    assert int(run(Toy(), LinearSource(), config_for(tmp_path / 'bad', **settings)).step) == 12


def test_unguarded_program_is_a_mistake(tmp_path):
    class Unguarded(Toy):
        def train_step(self, variant, state, frozen, batch, key):
            return state, {'accuracy': jnp.zeros(())}

    with pytest.raises(TypeError, match='no metric that ends in loss or grad_norm'):
        run(Unguarded(), LinearSource(), config_for(tmp_path))


def test_settings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(InputError, match='3 does not divide the 8 devices'):
        run(Toy(), LinearSource(), config_for(tmp_path, mesh=MeshConfig(-1, 3, 1)))
    with pytest.raises(InputError, match=r'batch_size is 6, but data x fsdp of the mesh is 4'):
        run(Toy(), LinearSource(), config_for(tmp_path, batch_size=6))
    with pytest.raises(InputError, match='log_every is 0'):
        config_for(tmp_path, log_every=0)
    with pytest.raises(InputError, match='data source is empty'):
        run(Toy(), LinearSource(0), config_for(tmp_path))


def test_plan_counts_without_running(tmp_path):
    text = loop.plan(Toy(), LinearSource(), config_for(tmp_path, mesh=MeshConfig(1, 4, 1)))
    assert 'warning: mesh 1x4x1 (data x fsdp x tensor) uses 4 of the 8 devices. Set loop.mesh.data to 2' in text
    text = loop.plan(Toy(), LinearSource(), config_for(tmp_path, updates=3))
    assert 'warning' not in text
    numbers = 2 * WIDTH * HIDDEN + WIDTH + HIDDEN
    lines = text.splitlines()
    assert lines[0] == 'toy: 12 steps on 8 of 8 devices'
    assert 'batch  x  [3, 8, 16]  float32' in lines
    assert any(line.split()[:2] == ['student', f'{numbers:,}'] for line in lines)
    assert any(line.split()[:2] == ['optimizer', f'{2 * numbers + 1:,}'] for line in lines)
    assert any(line.split()[:1] == ['state/student/image_mlp/linear_1/kernel'] for line in lines)
    # Five products of 24 rows: two forward, one and two backward, where the inputs need no gradient.
    products = 5 * 2 * 24 * WIDTH * HIDDEN
    assert f'step of variant 1  {products / 1e3:.0f} kFLOP  50% of the steps' in lines
    average, per_device, total = (products / scale for scale in (1e3, 8e3, 1e6 / 12))
    summary = f'{average:.0f} kFLOP per step on average, {per_device:.1f} kFLOP per device, {total:.2f} MFLOP in all: '
    assert any(line.startswith(summary) for line in lines), text
    assert not any(tmp_path.iterdir())


def start(folder, **environment) -> subprocess.Popen[str]:
    """Start a process that trains in a folder until it is stopped."""
    paths = os.pathsep.join([str(goldens.GOLDENS.parents[1]), *sys.path])
    return subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        env=os.environ | {'PYTHONPATH': paths} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process) -> None:
    """Return when a condition holds. A process that is signaled too early has no handler yet, and dies."""
    deadline = time.time() + 300
    while not condition():
        if process.poll() is not None or time.time() > deadline:
            process.kill()
            pytest.fail(f'ended early, or too slow: {process.communicate()[0]}')
        time.sleep(0.05)


def test_signals_ask_for_a_trace_and_for_a_clean_end(tmp_path):
    folder = tmp_path / 'run'
    process = start(folder)
    try:
        wait_for(lambda: read_metrics(folder), process)
        process.send_signal(signal.SIGUSR1)
        wait_for(lambda: traces(folder), process)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0 and 'stopped and saved at step' in output, output
    assert len(traces(folder)) == 1 and f'profile of steps {traces(folder)[0].split("-")[1]} to ' in output
    step = checkpoint_steps(folder)[-1]
    assert 4 <= step < 10_000
    config = config_for(folder, steps=step + 3)
    resumed = run(Toy(), LinearSource(), config)
    whole = run(Toy(), LinearSource(), dataclasses.replace(config, workdir=str(tmp_path / 'whole')))
    assert_equal(resumed, whole)


def test_a_trace_that_is_requested_before_the_run_is_of_its_first_steps(tmp_path):
    """While a process reads data and compiles, SIGUSR1 must not end it."""
    restore = note_requests()
    try:
        signal.raise_signal(signal.SIGUSR1)
        run(Toy(), LinearSource(), config_for(tmp_path / 'run', steps=6))
    finally:
        restore()
    assert traces(tmp_path / 'run') == [f'steps-1-{STEPS_ON_SIGNAL}']


def test_a_program_notes_requests_from_its_start():
    """The run itself does not begin: its first act is the signal, whose default action ends the process."""
    signal_itself = 'lambda settings, dry_run: os.kill(os.getpid(), signal.SIGUSR1)'
    code = f'import os, signal, train.runtime.runner as runner; runner.command_line({signal_itself}, "configs/dmd.py")'
    run = subprocess.run([sys.executable, '-c', code], cwd=goldens.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_ctrl_c_saves_as_sigterm_does(tmp_path):
    folder = tmp_path / 'run'
    process = start(folder)
    try:
        wait_for(lambda: read_metrics(folder), process)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0 and 'stopped and saved at step' in output, output
    assert 'Traceback' not in output and checkpoint_steps(folder)


def test_a_checkpoint_of_an_earlier_version_is_not_called_damaged(unbroken, tmp_path):
    """Before checksums, the item held the place alone. Its owner must not be told to delete it."""
    shutil.copytree(unbroken[0], tmp_path / 'run')
    path = tmp_path / 'run' / 'checkpoints' / '12' / 'place' / 'metadata'
    path.write_text(json.dumps(json.loads(path.read_text())['place']))
    with pytest.raises(InputError, match=r'has no checksums, so an earlier version .* Nothing is lost'):
        run(Toy(), LinearSource(), config_for(tmp_path / 'run', steps=14))


def damage(checkpoint):
    """Cut every file of the arrays in half."""
    for path in (checkpoint / 'state').rglob('*'):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.long
def test_several_processes_name_the_newest_good_checkpoint(unbroken, tmp_path):
    """Each searches alone, because the others may have restored their parts."""
    shutil.copytree(unbroken[0], tmp_path / 'run')
    damage(tmp_path / 'run' / 'checkpoints' / '12')
    with Job([__file__, str(tmp_path / 'run')], tmp_path / 'log.txt') as job:
        assert job.wait() != 0, job.output
    assert re.search(r'checkpoints/12: the checkpoint is damaged .*/12 to continue from step 10', job.output), (
        job.output
    )


def test_a_damaged_checkpoint_is_named_with_the_newest_good_one(unbroken, tmp_path):
    shutil.copytree(unbroken[0], tmp_path / 'run')
    damage(tmp_path / 'run' / 'checkpoints' / '12')
    with pytest.raises(InputError, match=r'checkpoints/12: the checkpoint is damaged .*/12 to continue from step 10'):
        run(Toy(), LinearSource(), config_for(tmp_path / 'run', steps=14))
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '12')
    assert int(run(Toy(), LinearSource(), config_for(tmp_path / 'run', steps=14)).step) == 14


@pytest.mark.long
def test_two_processes_stop_together_and_one_goes_on(tmp_path):
    folder = tmp_path / 'run'
    with Job([__file__, str(folder)], tmp_path / 'log.txt') as job:
        job.until(lambda: read_metrics(folder))
        job.workers()[1].send_signal(signal.SIGTERM)
        assert job.wait() == 0, job.output
        assert '[0] toy: stopped and saved at step' in job.output
    config = config_for(folder, steps=checkpoint_steps(folder)[-1] + 3)
    resumed = run(Toy(), LinearSource(), config)
    whole = run(Toy(), LinearSource(), dataclasses.replace(config, workdir=str(tmp_path / 'whole')))
    assert int(resumed.seen) == int(whole.seen)
    _assert_close(resumed.student, whole.student)


def test_checkpoints_hold_the_newest_only(tmp_path):
    run(Toy(), LinearSource(), config_for(tmp_path, steps=12, checkpoint_every=2, keep=2))
    assert checkpoint_steps(tmp_path) == [10, 12]
    assert json.loads((tmp_path / 'checkpoints' / '12' / 'metadata' / 'metadata').read_text())['flavor'] == 'plain'


if __name__ == '__main__':
    # A shell that starts the tests in the background makes them, and their processes, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(Toy(seconds_per_step=0.02), LinearSource(), config_for(sys.argv[1], steps=10_000, checkpoint_every=10_000))
