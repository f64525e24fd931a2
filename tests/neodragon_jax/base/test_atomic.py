"""Tests of drafts left by killed processes: the next writer removes these, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from neodragon_jax.base import atomic
from neodragon_jax.base.atomic import atomic_file, atomic_folder, scratch_folder, sweep
from support.goldens import ROOT

WRITERS = {
    'file': 'with atomic_file(sys.argv[1]) as path: path.write_text("half"); wait()',
    'folder': 'with atomic_folder(sys.argv[1]) as path: (path / "x").write_text("half"); wait()',
    'scratch': 'with scratch_folder(sys.argv[1]) as path: (path / "x").write_text("half"); wait()',
    # Killed between the two renames that swap an old and a new folder.
    'swap': """
with atomic_folder(sys.argv[1], replace=True) as path:
    (path / "x").write_text("new")
    rename, count = os.rename, [0]
    def second(*paths):
        count[0] += 1
        wait() if count[0] == 2 else rename(*paths)
    os.rename = second
""",
}
HEADER = """
import os, sys, time
from neodragon_jax.base.atomic import atomic_file, atomic_folder, scratch_folder
def wait():
    print('writing', flush=True)
    time.sleep(600)
"""


def killed(kind, target):
    """Kill a process in the middle of writing; return after it is gone."""
    command = [sys.executable, '-c', HEADER + WRITERS[kind], str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout and process.stdout.readline() == 'writing\n'
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """Reset the record of the folders that this process has swept."""
    monkeypatch.setattr(atomic, '_SWEPT', set())


def test_scratch_folders_are_removed_at_the_end_or_by_the_next_process(tmp_path):
    with scratch_folder(tmp_path) as path:
        (path / 'x').write_text('half')
    assert not list(tmp_path.iterdir())
    killed('scratch', tmp_path)
    assert [path.name.startswith('.scratch.draft-') for path in tmp_path.iterdir()] == [True]
    atomic._SWEPT.clear()
    with scratch_folder(tmp_path) as path:
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_next_writer_removes_the_draft_of_a_killed_one(tmp_path, kind):
    killed(kind, tmp_path / 'result.txt')
    (draft,) = tmp_path.iterdir()
    assert draft.name.startswith('.result.draft-') and draft.suffix == '.txt'
    with atomic_file(tmp_path / 'other.txt') as path:
        path.write_text('whole')
    assert [path.name for path in tmp_path.iterdir()] == ['other.txt']


def test_folder_moved_aside_by_a_killed_process_gets_its_name_back(tmp_path):
    (tmp_path / 'result').mkdir()
    (tmp_path / 'result' / 'x').write_text('old')
    killed('swap', tmp_path / 'result')
    assert not (tmp_path / 'result').exists()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['result']
    assert (tmp_path / 'result' / 'x').read_text() == 'old'


def test_drafts_of_living_processes_and_other_hosts_stay(tmp_path):
    with atomic_folder(tmp_path / 'mine') as mine:
        others = ['.a.draft-00000000-1-0123456789ab.txt', '.hidden', '.a.draft-x', 'a.draft-00000000-1-0123456789ab']
        for name in others:
            (tmp_path / name).write_text('')
        sweep(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, mine.name])
