"""The programs of the benchmark: their seconds, and how they stop."""

from __future__ import annotations

import os
import pathlib
import signal
import threading
import time

import pytest

from neodragon_jax.base.errors import InputError
from neodragon_jax.base.json_file import read_json
from train.benchmark import schedule
from train.benchmark.chain import Step
from train.benchmark.programs import Programs, copy_parts

# Saves on SIGTERM, as trainings do, or ignores it; the second argument is the folder.
PROGRAM = """
import pathlib, signal, sys, time
kind, folder = sys.argv[1], pathlib.Path(sys.argv[2])
def save(*_):
    (folder / 'saved').touch()
    sys.exit(0)
if kind != 'ends':
    signal.signal(signal.SIGTERM, save if kind == 'saves' else signal.SIG_IGN)
    (folder / 'begun').touch()
    time.sleep(120)
"""


@pytest.fixture(name='programs')
def _programs(tmp_path) -> Programs:
    (tmp_path / 'one_program.py').write_text(PROGRAM)
    return Programs(os.environ | {'PYTHONPATH': str(tmp_path)})


def step(folder: pathlib.Path, name: str, kind: str) -> Step:
    """Return a step that runs PROGRAM and leaves no result."""
    (folder / name).mkdir()
    return Step(name, folder / name / 'done', 'one_program', [kind, str(folder / name)])


def signals_once_begun(*steps: Step, signals: tuple[signal.Signals, ...]) -> None:
    """Send signals to this process, one after another, as soon as some programs run."""

    def send() -> None:
        while not all((step.result.parent / 'begun').exists() for step in steps):
            time.sleep(0.01)
        for one in signals:
            os.kill(os.getpid(), one)
            time.sleep(0.3)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize('first', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_all_programs_save_and_starts_no_others(programs, tmp_path, first):
    steps = [step(tmp_path, name, 'saves') for name in 'abc']
    signals_once_begun(*steps[:2], signals=(first,))
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), programs.stopped_by_signals():
        schedule.run_all(steps, 2, lambda step: programs.run(step, tmp_path), lambda *_: None)
    assert [(tmp_path / name / 'saved').exists() for name in 'abc'] == [True, True, False]
    assert read_json(tmp_path / 'times.json', dict[str, float]).keys() == {'a', 'b'}  # what was spent is not lost
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_signal_ends_programs_that_do_not_stop(programs, tmp_path):
    steps = [step(tmp_path, 'a', 'ignores')]
    signals_once_begun(*steps, signals=(signal.SIGINT, signal.SIGINT))
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), programs.stopped_by_signals():
        schedule.run_all(steps, 1, lambda step: programs.run(step, tmp_path), lambda *_: None)
    assert time.monotonic() - start < 60


def test_a_program_without_its_result_has_not_ended(programs, tmp_path):
    """A training that gets SIGTERM saves and ends with status 0; what reads its result must not begin."""
    with pytest.raises(InputError, match=r'step a was stopped before its end.*Run the same command again'):
        programs.run(step(tmp_path, 'a', 'ends'), tmp_path)
    assert '$ python -m one_program ends' in (tmp_path / 'logs' / 'a.txt').read_text()


def test_a_part_is_renewed_with_its_source(tmp_path):
    source, target = tmp_path / 'made', tmp_path / 'checkpoint' / 'part'
    source.mkdir()
    step = Step('samples', tmp_path / 'done', 'this', [], {target: source})
    for text in ('{"old": 1}', '{"new": 1}'):
        (source / 'config.json').write_text(text)
        copy_parts(step)
        assert (target / 'config.json').read_text() == text
    before = (target / 'config.json').stat().st_ino
    copy_parts(step)
    assert (target / 'config.json').stat().st_ino == before
