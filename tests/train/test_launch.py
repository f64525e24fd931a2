"""The launcher of local processes: its environment, output, signals and status; no process outlives it."""

from __future__ import annotations

import signal

import jax
import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.processes import PROCESS_VARIABLES, start_processes
from support.jobs import Job
from train import launch

# Seconds within which a job, or the part of it that a test waits for, must make progress on a busy machine.


@pytest.fixture
def script(tmp_path):
    """A function that makes a job of a few lines of Python."""

    def start(*lines: str, **options) -> Job:
        path = tmp_path / 'script.py'
        path.write_text('\n'.join(['import os, signal, sys, time', 'index = os.environ["JAX_PROCESS_ID"]', *lines]))
        return Job([str(path), 'one', 'two words'], tmp_path / 'log.txt', **options)

    return start


def test_processes_know_their_number_and_their_lines_are_marked(script):
    names = ['JAX_NUM_PROCESSES', 'JAX_NUM_CPU_DEVICES', 'JAX_PLATFORMS', 'JAX_COORDINATOR_ADDRESS']
    with script(f'print(sys.argv[1:], *(os.environ[name] for name in {names}))', processes=3, devices=2) as job:
        assert job.wait(30) == 0
        lines = sorted(job.output.splitlines())
    assert [line[:4] for line in lines] == ['[0] ', '[1] ', '[2] ']
    rest = {line[4:] for line in lines}
    assert len(rest) == 1 and rest.pop().startswith("['one', 'two words'] 3 2 cpu localhost:")


def test_first_failure_is_reported_and_ends_the_others(script):
    with script('if index == "1": sys.exit("no such file")', 'time.sleep(600)') as job:
        assert job.wait(30) == 1
        assert '[1] no such file\n' in job.output
        assert 'launch: process 1 of 2 failed with status 1; ending the others.\n' in job.output


@pytest.mark.parametrize('victim', [-1, 0, 1])
def test_nothing_outlives_a_kill(script, victim):
    with script('print("ready")', 'time.sleep(600)') as job:
        job.until(lambda: job.output.count('ready') == 2)
        job.kill(victim)


def test_sigterm_is_passed_on(script):
    handler = 'signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("saved")))'
    with script(handler, 'print("ready")', 'time.sleep(600)') as job:
        job.until(lambda: job.output.count('ready') == 2)
        job.launcher.send_signal(signal.SIGTERM)
        assert job.wait(30) == 0
        assert job.output.count('saved') == 2


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ([], 'no program to launch; give it after two dashes'),
        (['--processes', '2', '--'], 'no program to launch'),
        (['--devices', '0', '--', 'train.dmd'], '--devices is 0'),
    ],
)
def test_wrong_commands_are_refused_in_one_line(argv, message, capsys):
    assert launch.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit, match='0'):
        launch.main(['--help'])
    assert '--processes 2 --devices 4 -- train.dmd' in capsys.readouterr().out


def test_error_of_one_process_ends_the_job_at_once(tmp_path):
    """Without this, the failed process would wait for minutes at its exit, for processes that wait for it."""
    path = tmp_path / 'script.py'
    path.write_text(
        'import time\n'
        'import jax\n'
        'from neodragon_jax.base.errors import InputError\n'
        'from train.runtime.runner import command_line\n'
        'from neodragon_jax.base.processes import start_processes\n'
        'from train.runtime.processes import of_first_process\n'
        'def main(settings, dry_run):\n'
        '    start_processes()\n'
        '    print(of_first_process({"numbers": [1.5, float("nan"), -float("inf"), jax.process_index()]}))\n'
        '    if jax.process_index() == 1:\n'
        '        raise InputError("the disk of this host is not there; mount it.")\n'
        '    time.sleep(600)\n'
        'command_line(main, "configs/super_resolution.py")\n'
    )
    with Job([str(path)], tmp_path / 'log.txt', devices=1) as job:
        assert job.wait(60) == 2, job.output
        assert all(f"[{process}] {{'numbers': [1.5, nan, -inf, 0]}}" in job.output for process in (0, 1))
        assert '[1] error: the disk of this host is not there; mount it.\n' in job.output
        assert 'launch: process 1 of 2 failed with status 2' in job.output


# --- How processes recognize each other -------------------------------------------------------------------------------


@pytest.fixture
def joined(monkeypatch):
    """A clean environment, and the arguments with which JAX's coordination would start."""
    for name in (*PROCESS_VARIABLES, 'TPU_WORKER_HOSTNAMES'):
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr('neodragon_jax.base.processes.roll_call', lambda *given: None)  # there are no other processes
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **given: calls.append(given))
    monkeypatch.setattr('atexit.register', lambda function: None)
    return calls


def place(address: str, count: int, index: int, devices: list[int] | None = None) -> dict[str, object]:
    """Return the arguments of `jax.distributed.initialize`."""
    return {
        'coordinator_address': address,
        'num_processes': count,
        'process_id': index,
        'local_device_ids': devices,
    }


SLURM_JOB = 3
SLURM_PORT = 65535 - 2**12 + 1 + SLURM_JOB  # chosen by JAX


@pytest.fixture
def slurm(monkeypatch):
    """A function that sets the environment of one of three processes of a Slurm job on this machine."""

    def task(index: int) -> None:
        values = {'JOB_ID': SLURM_JOB, 'STEP_NODELIST': 'localhost', 'NTASKS': 3, 'PROCID': index, 'LOCALID': 0}
        for name, value in values.items():
            monkeypatch.setenv(f'SLURM_{name}', str(value))

    return task


def test_one_process_joins_nobody(joined, monkeypatch):
    monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'localhost')
    start_processes()
    assert joined == []


def test_environment_comes_before_what_jax_recognizes(joined, monkeypatch):
    for name, value in zip(PROCESS_VARIABLES, ('host:1', '4', '3'), strict=True):
        monkeypatch.setenv(name, value)
    start_processes(distributed=True)
    assert joined == [place('host:1', 4, 3)]


@pytest.mark.parametrize(('distributed', 'hosts'), [(True, ''), (False, 't-0.pod,t-1.pod')])
def test_the_place_in_a_cluster_is_found_by_jax(joined, slurm, monkeypatch, distributed, hosts):
    monkeypatch.setenv('TPU_WORKER_HOSTNAMES', hosts)
    slurm(2)
    start_processes(distributed)
    assert joined == [place(f'localhost:{SLURM_PORT}', 3, 2, [0])]


def test_a_missing_process_of_a_cluster_is_named(slurm, capsys):
    """JAX's own start would abort after minutes, with a stack trace."""
    slurm(0)
    with pytest.raises(InputError, match='process 1, 2 of 3 did not start within 1 s'):
        start_processes(distributed=True, timeout_s=1)


def test_no_cluster_is_named(joined):
    with pytest.raises(InputError, match='distributed is set, but JAX recognizes no cluster here'):
        start_processes(distributed=True)


@pytest.mark.parametrize(
    'values',
    [('host:1', None, None), (None, '2', '0'), ('host:1', '2', '2'), ('host:1', 'two', '0'), ('', '2', '0')],
)
def test_process_numbers_must_be_complete(joined, monkeypatch, values):
    for name, value in zip(PROCESS_VARIABLES, values, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match='set all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID'):
        start_processes()
    assert joined == []
