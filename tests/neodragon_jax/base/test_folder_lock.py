"""Tests of the lock of an output folder: two processes, a killed owner, and an owner on another host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from neodragon_jax.base import folder_lock
from neodragon_jax.base.atomic import atomic_folder
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.folder_lock import folder_lock as hold
from neodragon_jax.base.output import output_folder
from support.goldens import ROOT

OWNER = """
import sys, time
from neodragon_jax.base.folder_lock import folder_lock
with folder_lock(sys.argv[1], *sys.argv[2:]):
    print('locked', flush=True)
    sys.stdin.read()
"""


def own(folder, *part):
    """Start a process that holds the lock of a folder until its standard input is closed."""
    command = [sys.executable, '-c', OWNER, str(folder), *part]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout and process.stdout.readline() == 'locked\n'
    return process


def test_second_process_is_refused_with_the_name_of_the_first(tmp_path):
    owner = own(tmp_path / 'run')
    with (
        pytest.raises(InputError, match=rf'run: process {owner.pid} on .*, since 20.* is writing into it\. Wait'),
        hold(tmp_path / 'run'),
    ):
        pass
    owner.communicate()
    with hold(tmp_path / 'run'):
        assert [path.name for path in (tmp_path / 'run').iterdir()] == ['.lock']
    assert not (tmp_path / 'run').exists()


def test_lock_of_a_killed_process_is_taken_over(tmp_path):
    owner = own(tmp_path)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    left = json.loads((tmp_path / '.lock').read_text())
    assert left['pid'] == owner.pid
    with hold(tmp_path):
        assert json.loads((tmp_path / '.lock').read_text())['pid'] == os.getpid()


def test_parts_of_a_folder_have_locks_of_their_own(tmp_path):
    owner = own(tmp_path, '1')
    with hold(tmp_path, part='0'):
        pass
    with pytest.raises(InputError, match='writing into it'), hold(tmp_path, part='1'):
        pass
    owner.communicate()


def left_elsewhere(folder, age_s: float = 0.0) -> dict:
    """Write a lock of another host, renewed so many seconds ago."""
    owner = {'host': 'elsewhere', 'pid': 7, 'started': '2026-01-02T03:04:05+00:00'}
    (folder / '.lock').write_text(json.dumps(owner))
    renewed = time.time() - age_s
    os.utime(folder / '.lock', (renewed, renewed))
    return owner


def test_owner_on_another_host_is_named_until_its_lock_expires(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, 'UNTIL_EXPIRED_S', 0.0)
    owner = left_elsewhere(tmp_path, folder_lock.EXPIRES_S - 10)
    message = r'process 7 on elsewhere, since 2026-01-02T03:04:05\+00:00, is writing into it\. .* expires after 90 s'
    with pytest.raises(InputError, match=message), hold(tmp_path):
        pass
    assert json.loads((tmp_path / '.lock').read_text()) == owner
    left_elsewhere(tmp_path, folder_lock.EXPIRES_S + 1)
    with hold(tmp_path):
        assert json.loads((tmp_path / '.lock').read_text())['pid'] == os.getpid()


@pytest.mark.parametrize('take', [hold, output_folder])
def test_every_process_waits_until_the_lock_of_another_host_expires(tmp_path, monkeypatch, capsys, take):
    """A preempted job of any kind may restart on another host, where the lock of the old one has yet to expire."""
    monkeypatch.setattr(folder_lock, '_POLL_S', 0.05)
    left_elsewhere(tmp_path, folder_lock.EXPIRES_S - 0.5)
    with take(tmp_path):
        assert json.loads((tmp_path / '.lock').read_text())['pid'] == os.getpid()
    assert capsys.readouterr().err.count('process 7 on elsewhere') == 1


def test_the_owner_renews_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, 'RENEW_S', 0.02)
    with hold(tmp_path):
        first, deadline = (tmp_path / '.lock').stat().st_mtime_ns, time.monotonic() + 10
        while (tmp_path / '.lock').stat().st_mtime_ns == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / '.lock').stat().st_mtime_ns > first


@pytest.mark.parametrize('content', ['', 'x', '[]', '{"host": 3}'])
def test_damaged_lock_file_is_taken_over_or_refused_in_one_line(tmp_path, monkeypatch, content):
    monkeypatch.setattr(folder_lock, 'UNTIL_EXPIRED_S', 0.0)
    (tmp_path / '.lock').write_text(content)
    if 'host' in content:
        with pytest.raises(InputError, match='another process is writing into it'), hold(tmp_path):
            pass
    else:
        with hold(tmp_path):
            pass


def test_one_process_locks_a_folder_once(tmp_path):
    with (
        hold(tmp_path),
        pytest.raises(InputError, match='this process writes into it already'),
        hold(tmp_path / '.'),
    ):
        pass


def test_a_folder_that_stays_empty_is_removed_with_the_parents_that_were_made_for_it(tmp_path):
    (tmp_path / 'old').mkdir()
    with pytest.raises(KeyError), hold(tmp_path / 'old' / 'a' / 'b'):
        raise KeyError
    assert not list((tmp_path / 'old').iterdir())
    with pytest.raises(KeyError), hold(tmp_path / 'old' / 'a' / 'b'):
        (tmp_path / 'old' / 'a' / 'c').write_text('x')
        raise KeyError
    assert [path.name for path in (tmp_path / 'old' / 'a').iterdir()] == ['c']


def test_lock_is_no_content_of_a_folder(tmp_path):
    with hold(tmp_path / 'out'), atomic_folder(tmp_path / 'out') as partial:
        (partial / 'result').write_text('x')
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['result']


def test_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='file is, or lies under, a file'), hold(tmp_path / 'file'):
        pass
