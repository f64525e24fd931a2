"""The commands of the documents for a pod: what starts in the background returns at once, and is what a stop ends."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import time

import psutil
import pytest

from configs import dmd as dmd_settings
from support.goldens import ROOT

PAGES = {path.name: path.read_text() for path in sorted((ROOT / 'docs').glob('*.md'))}
# Stands for the interpreter: prints flags, or says that it runs until SIGTERM, like a program with a graceful stop.
PYTHON = """#!/bin/sh
case "$*" in *tpu_flags*) echo --flag=1; exit;; esac
trap 'echo stopped; exit' TERM
echo started
while sleep 0.1; do :; done
"""


def remote_commands() -> list[tuple[str, str]]:
    """Return (page, command) of every command that gcloud runs on the hosts of a slice."""
    found = []
    for page, text in PAGES.items():
        for quote, command in re.findall(r"""--command=(['"])(.*?)(?<!\\)\1(?=\n|`)""", text, re.DOTALL):
            # What the local shell makes of it before it is sent.
            plain = re.sub(r'\\(["$])', r'\1', command.replace('$CKPT', 'CKPT')) if quote == '"' else command
            found.append((page, plain))
    return found


BACKGROUND = [(page, command) for page, command in remote_commands() if 'nohup' in command]
STOPS = {
    re.findall(r'-f (\S+)', command)[0]: command for _, command in remote_commands() if command.startswith('pkill')
}


def session(number: int) -> list[psutil.Process]:
    """Return the processes of a session, the oldest first."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == number and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return sorted(found, key=lambda process: (process.create_time(), process.pid))


def oldest(number: int, pattern: str) -> psutil.Process | None:
    """Return the process of a session that `pkill --oldest -f PATTERN` would choose; pkill itself looks at all."""
    return next((each for each in session(number) if re.search(pattern, ' '.join(each.cmdline()))), None)


def wait_for(log: pathlib.Path, text: str) -> None:
    """Return when a log has a text; the shell returns before its program runs."""
    end = time.monotonic() + 20
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < end, f'{log} never had {text!r}'
        time.sleep(0.05)


def test_commands_are_found():
    assert {page for page, _ in BACKGROUND} == {'first_hour.md', 'launch.md'} and len(BACKGROUND) >= 3
    assert set(STOPS) >= {'train.dmd', 'train.teacher_samples'}
    assert all(command.startswith('pkill -TERM --oldest -f ') for command in STOPS.values())


@pytest.mark.parametrize(('page', 'command'), BACKGROUND)
def test_a_start_returns_and_its_stop_reaches_the_program(page, command, tmp_path):
    """A shell that waits for the program would keep ssh's pipes open, and would be what the stop ends."""
    python = tmp_path / 'neodragon' / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'stdin': subprocess.DEVNULL}
    shell = subprocess.Popen(['bash', '-c', command], cwd=tmp_path, start_new_session=True, **pipes)
    (module,) = re.findall(r'python -m (train\.(?!tpu_flags)\w+)', command)
    try:
        assert shell.communicate(timeout=10) == (b'', b'')
        (log,) = (tmp_path / 'neodragon' / name for name in re.findall(r'> (\S+\.log)', command))
        wait_for(log, 'started')
        program = oldest(shell.pid, module)
        assert program is not None and program.cmdline()[1].endswith('python'), session(shell.pid)
        program.terminate()
        program.wait(10)
        assert 'stopped' in log.read_text()
        assert oldest(shell.pid, module) is None
        assert module in STOPS, f'{page}: no command stops {module}'
    finally:
        for process in session(shell.pid):
            process.kill()
        shell.wait()


def test_the_log_that_is_shown_is_the_one_that_is_written():
    for page in {page for page, _ in BACKGROUND}:
        written = {f'neodragon/{log}' for there, command in BACKGROUND if there == page
                   for log in re.findall(r'> (\S+\.log)', command)}  # fmt: skip
        shown = {command.split()[-1] for there, command in remote_commands() if there == page and 'tail' in command}
        assert shown == written, page


# --- Settings of each slice -------------------------------------------------------------------------------------------


def rows(page: str, first: str) -> list[list[str]]:
    """Return the cells of the first table of a page whose first column has this title."""
    table = PAGES[page].partition(f'\n| {first} |')[2].partition('\n\n')[0]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()[2:]]


def sized() -> dict[tuple[str, int], list[str]]:
    """Return {(kind of TPU, chips): [mesh, remat, batch per device]} of the slices whose program was compiled."""
    found = {}
    for topology, *cells in rows('tpu_sizing.md', 'topology'):
        kind, chips = re.findall(r'(\w+):.*\((\d+) chips\)', topology)[0]
        found[kind, int(chips)] = cells[:3]
    return found


def test_every_sized_slice_has_its_settings():
    """A team with another slice than the guide's finds a line that fills it, with the sizes of the estimate."""
    found = {}
    for slice_, chips, given in rows('first_hour.md', 'slice'):
        kind, _, number = slice_.rpartition('-')
        count = int(number) // (2 if kind == 'v5p' else 1)
        assert int(chips) == count
        settings = dict(word.removeprefix('--config.').split('=') for word in given.strip('`').split())
        default = dmd_settings.get_config()
        mesh = [int(settings.get(f'loop.mesh.{axis}', default.loop.mesh[axis])) for axis in ('data', 'fsdp', 'tensor')]
        each = int(settings['loop.batch_size']) // count
        found['v5e' if kind == 'v5litepod' else kind, count] = [
            'x'.join(map(str, mesh)), settings.get('dmd.remat', default.dmd.remat), str(each)
        ]  # fmt: skip
    assert found == sized() and len(found) > 5


def test_every_page_sets_project_and_zone():
    """Without them, a command asks for a zone, or makes a slice in the wrong project."""
    for page, text in PAGES.items():
        first = re.search(r'gcloud compute tpus tpu-vm create|xpk cluster create', text)
        if first:
            before = text[: first.start()]
            assert 'gcloud config set project $PROJECT && gcloud config set compute/zone $ZONE' in before, page
