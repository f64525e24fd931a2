"""Tests of command errors: one line and a documented exit status for every failure that a user can fix."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import jax
import pytest

from neodragon_jax.base import command_line
from neodragon_jax.base.atomic import check_writable
from neodragon_jax.base.command_line import exit_status
from neodragon_jax.base.errors import InputError


def failing(error: BaseException):
    def program() -> None:
        raise error

    return program


@pytest.mark.parametrize(
    ('error', 'status', 'message'),
    [
        (InputError('--steps is 0; give at least 1.'), 2, '--steps is 0'),
        (OSError(errno.ENOSPC, 'x', '/out/a.mp4'), 3, '/out/a.mp4: no space is left'),
        (PermissionError(errno.EACCES, 'x', '/out'), 3, '/out: permission denied'),
        (OSError(errno.EROFS, 'x', '/out'), 3, 'read-only'),
        (OSError(errno.EMFILE, 'x', '/out'), 3, 'too many open files'),
        (FileNotFoundError(errno.ENOENT, 'x', 'a\nb\udce9'), 3, 'a b\\udce9: no such file'),
        (OSError(errno.EFBIG, 'x', '/out/a.mp4'), 3, '/out/a.mp4: the file is larger than the limit'),
        (OSError(errno.EBUSY, 'Device or resource busy', '/out'), 3, '/out: Device or resource busy; choose another'),
        (KeyboardInterrupt(), 130, 'interrupted'),
        (BrokenPipeError(errno.EPIPE, 'x'), 141, 'closed it before the work was finished'),
    ],
)
def test_failures_are_one_line(capsys, monkeypatch, error, status, message):
    monkeypatch.setattr(sys, 'stdout', sys.stdout)  # a closed one is replaced
    assert exit_status(failing(error)) == status
    said = capsys.readouterr().err
    assert said.startswith('error: ') and said.count('\n') == 1 and message in said
    assert f'  {status} ' in command_line.EXIT_CODES


def test_success_is_zero_and_faults_of_ours_are_not_hidden():
    assert exit_status(lambda: None) == 0
    for error in (ZeroDivisionError(), OSError('no number'), OSError(errno.ECONNREFUSED, 'no file')):
        with pytest.raises(type(error)):
            exit_status(failing(error))


@pytest.mark.parametrize(('finished', 'status'), [(False, 141), (True, 0)])
def test_a_reader_that_closes_the_output(finished, status):
    """Work that is left is a failure; output that is left is none."""
    code = (
        'import sys; from neodragon_jax.base.command_line import exit_status\n'
        f'sys.exit(exit_status(lambda: print("made", flush={not finished})))'
    )
    buffered = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    program = subprocess.Popen([sys.executable, '-c', code], env=buffered, text=True, **pipes)
    program.stdout.close()
    error = program.stderr.read()
    assert program.wait() == status
    assert ('closed it before' in error) == (not finished) and 'Traceback' not in error and 'ignored' not in error


def test_outputs_are_tried_before_the_work(tmp_path):
    check_writable(tmp_path / 'new' / 'folder')
    assert not os.listdir(tmp_path)
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='is, or lies under, a file'):
        check_writable(tmp_path / 'file')


@pytest.mark.parametrize('chosen', ['foo', 'cuda', 'tpu,foo'])
def test_a_platform_that_jax_cannot_use_is_one_line(chosen):
    code = """
import sys, jax
from neodragon_jax.base.command_line import exit_status
sys.exit(exit_status(lambda: jax.local_devices()))
"""
    environment = os.environ | {'JAX_PLATFORMS': chosen}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if 'error' in line]
    assert line.startswith(f'error: JAX cannot use the platform of JAX_PLATFORMS={chosen}: ')
    assert 'Traceback' not in done.stderr and '..' not in line


@pytest.mark.parametrize('chosen', ['cpu', 'foo'])
def test_another_failure_keeps_its_traceback_and_looks_for_no_device(monkeypatch, chosen):
    monkeypatch.setenv('JAX_PLATFORMS', chosen)
    monkeypatch.setattr(jax, 'devices', lambda *_: pytest.fail('on a pod this may wait for other hosts'))
    with pytest.raises(RuntimeError, match='a fault'):
        exit_status(failing(RuntimeError('a fault')))
