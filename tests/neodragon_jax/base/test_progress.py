"""Tests of progress without a terminal."""

from __future__ import annotations

from neodragon_jax.base import progress
from neodragon_jax.base.progress import ProgressBar


def test_lines_at_intervals_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, 'LINE_EVERY_S', 0.0)
    assert list(ProgressBar(range(3), unit='clip', desc='cutting')) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith('cutting: 2 of 3 clips') for line in lines) and '\r' not in ''.join(lines)
    assert list(ProgressBar(range(3), unit='clip', hidden=True)) == [0, 1, 2]
    assert capsys.readouterr().err == ''


def test_short_loops_are_silent(capsys):
    with ProgressBar(total=3, unit='step') as bar:
        bar.update(3)
        bar.set_postfix_str('denoising', refresh=False)
    assert capsys.readouterr().err == ''
