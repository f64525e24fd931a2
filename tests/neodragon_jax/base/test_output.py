"""Tests of output folders: held by one process, free of drafts of killed ones, and checked before any work."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from neodragon_jax.base import atomic
from neodragon_jax.base.command_line import exit_status
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.output import output_folder


def test_another_process_is_named(tmp_path):
    code = (
        'import sys, time; from neodragon_jax.base.output import output_folder\n'
        f'with output_folder({str(tmp_path)!r}): print("held", flush=True); sys.stdin.read()'
    )
    with subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b'held\n'
        with (
            pytest.raises(InputError, match=rf'process {other.pid} on .*, since .* is writing into it'),
            output_folder(tmp_path),
        ):
            pass
        # The parts of one run have locks of their own.
        with output_folder(tmp_path, 0, 2), output_folder(tmp_path, 1, 2):
            pass
        other.kill()
    # The lock of a killed process is taken over.
    with output_folder(tmp_path):
        pass


def test_drafts_of_killed_processes_are_removed(tmp_path):
    code = (
        'import os, pathlib; from neodragon_jax.base.atomic import atomic_file\n'
        f'with atomic_file({str(tmp_path / "a.mp4")!r}) as draft: draft.write_text("half"); os._exit(9)'
    )
    subprocess.run([sys.executable, '-c', code], check=False)
    (draft,) = tmp_path.iterdir()
    assert re.match(r'\.a\.draft-', draft.name)
    atomic._SWEPT.clear()
    with output_folder(tmp_path):
        assert not draft.exists()


@pytest.mark.skipif(not os.access('/dev/full', os.W_OK), reason='no /dev/full on this system')
def test_a_full_disk_is_named_by_the_folder(tmp_path, capsys):
    def write() -> None:
        with output_folder(tmp_path), open('/dev/full', 'w') as file:
            file.write('x')

    assert exit_status(write) == 3
    assert f'{tmp_path}: no space is left on the disk' in capsys.readouterr().err
