"""The command train.teacher_samples: the order of its start, and its notices."""

from __future__ import annotations

import contextlib

import pytest

from support.goldens import TINY_CHECKPOINT
from train import teacher_samples
from train.flow import teacher_sampler


class Loaded(Exception):
    """The end of a test: the teacher would be loaded."""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A function that runs the command up to the loading of the teacher; returns its events."""
    events: list[str] = []

    @contextlib.contextmanager
    def shares(distributed, timeout_s, folder):
        events.append('roll call')
        yield 0, 1

    def load(request):
        raise Loaded

    for module, name in ((teacher_sampler, 'first_frame_model'), (teacher_sampler, 'find_teacher')):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, real=real, name=name: (events.append(name), real(*given))[1])
    monkeypatch.setattr(teacher_samples, 'separate_shares', shares)
    monkeypatch.setattr(teacher_samples, 'load_teacher', load)

    def run(prompts: int, *more: str) -> list[str]:
        (tmp_path / 'prompts.txt').write_text('\n'.join(f'prompt {number}' for number in range(prompts)))
        files = ['--checkpoint', str(TINY_CHECKPOINT), '--prompts-file', str(tmp_path / 'prompts.txt')]
        size = ['--frames', '17', '--height', '64', '--width', '64']
        with contextlib.suppress(Loaded):
            teacher_samples.main([*files, *size, '--out', str(tmp_path / 'out'), *more])
        return events

    return run


def test_the_others_wait_for_no_download(command):
    """They wait a minute for each process; models of gigabytes come after it."""
    assert command(9, '--count', '9') == ['roll call', 'first_frame_model', 'find_teacher']


def test_a_wrong_choice_is_refused_before_a_download(command, capsys):
    assert command(9, '--count', '9', '--steps', '0', '1', '1') == ['roll call']
    assert 'steps' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('prompts', 'more', 'refused'),
    [
        (8, ['--count', '16'], True),
        (9, ['--count', '16'], True),  # one of eight samples would be left
        (16, ['--count', '16'], False),
        (9, ['--count', '8'], True),
        (9, ['--count', '9'], False),
        (8, ['--count', '16', '--frames', '1'], False),  # data of configs/dmd.py:prompts, which holds out nothing
    ],
)
def test_too_few_prompts_are_told_before_the_sampling_is_paid(command, capsys, prompts, more, refused):
    command(prompts, *more)
    assert ('train.dmd will refuse these samples: it holds out 8' in capsys.readouterr().out) == refused
