"""Logs, speed and goodput of a run."""

from __future__ import annotations

import ast
import io
import math
import re
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from neodragon_jax.base import video
from neodragon_jax.base.errors import InputError
from support.goldens import ROOT
from train.runtime import metrics
from train.runtime.goodput import COMPILE, DATA, Goodput, speed
from train.runtime.metrics import JSON_LINES, MetricsLog, read_metrics
from train.runtime.peaks import peak_flops


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_goodput_is_the_share_of_the_time_in_steps():
    clock = Clock()
    goodput = Goodput(clock)
    for purpose, seconds in ((COMPILE, 30.0), (DATA, 10.0), (COMPILE, 20.0)):
        with goodput.spending(purpose):
            clock.now += seconds
    clock.now += 40
    assert goodput.elapsed() == 100 and goodput.outside_steps() == 50
    assert goodput.fraction() == pytest.approx(0.4)
    assert goodput.describe() == 'goodput 40.0% of 100.0 s; compile 50.0 s, data wait 10.0 s'


def test_utilization_is_of_the_peak_of_the_device():
    measured = speed(steps=10, seconds=2.0, flops=8e14, devices=4, peak=peak_flops('TPU v5 lite'))
    assert measured == {'steps_per_second': 5, 'tflops_per_device': 100, 'mfu': pytest.approx(100 / 197)}
    assert 'mfu' not in speed(1, 1.0, 1.0, 1, peak_flops('cpu'))
    assert peak_flops('TPU v5p') == peak_flops('TPU v5') == 459e12 and peak_flops('NVIDIA H200') == 989e12


def test_console_shows_the_choice_of_the_program_and_no_nan(tmp_path, capsys):
    values = {f'a{number}': 1.0 for number in range(9)} | {'fake_mse': 0.5, 'unit1': math.nan, 'loss': 2.0}
    with MetricsLog(tmp_path, start=0, steps=10, progress=False, shown=('fake_mse', 'unit1')) as log:
        log.write(1, values)
    out = capsys.readouterr().out
    assert out.startswith('step 1  fake_mse 0.5  ') and 'loss 2' in out and 'nan' not in out
    (row,) = read_metrics(tmp_path)
    assert row['unit1'] is None and row['a8'] == 1.0


def chosen_metrics() -> list[tuple[str, tuple[str, ...]]]:
    """Return (file, `shown`) of every program: the metrics that it wants on the console."""
    line = re.compile(r"^    (?:name, )?shown = (?:'\w+', )?(\(.*\))$", re.MULTILINE)
    paths = (path for path in sorted((ROOT / 'train').rglob('*.py')) if 'class ' in path.read_text())
    found = ((path.relative_to(ROOT), match) for path in paths for match in line.finditer(path.read_text()))
    return [(str(path), ast.literal_eval(match[1])) for path, match in found]


@pytest.mark.parametrize(('program', 'shown'), chosen_metrics())
def test_the_speed_is_the_end_of_every_console_line(program, shown, tmp_path, capsys):
    """A distillation chose five metrics and has two norms, and no place was left for the utilization."""
    values = {name: 1.0 for name in (*(f'a{number}' for number in range(9)), *shown, 'x_grad_norm', 'y_grad_norm')}
    speeds = {'steps_per_second': 2.0, 'tflops_per_device': 90.0, 'mfu': 0.47, 'goodput': 0.9}
    with MetricsLog(tmp_path, start=0, steps=10, progress=False, shown=shown) as log:
        log.write(1, values | speeds)
        log.write(2, {'eval/psnr': 20.0})
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith('  steps_per_second 2  tflops_per_device 90  mfu 0.47')
    assert [name for name in (*shown, 'x_grad_norm') if f'  {name} 1' not in first] == [], program
    assert second == 'step 2  eval/psnr 20'


def test_every_program_is_among_them():
    programs = {program for program, _ in chosen_metrics()}
    assert 'train/dmd/distillation.py' in programs and len(programs) >= 6


def test_progress_is_a_line_a_minute_without_a_terminal(tmp_path, capsys, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics.time, 'monotonic', clock)
    with MetricsLog(tmp_path, start=0, steps=100) as log:
        for done in range(1, 11):
            clock.now += 15
            log.advance(done)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ['progress  step 4 of 100, 24 min left', 'progress  step 8 of 100, 23 min left']


def test_a_damaged_log_is_named_and_an_unfinished_line_is_dropped(tmp_path):
    path = tmp_path / JSON_LINES
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path) == [{'step': 1}, {'step': 2}]
    with MetricsLog(tmp_path, start=1, steps=3, progress=False):
        pass
    assert path.read_text() == '{"step": 1}\n'
    for damaged in (b'{"step": 1}\nnothing\n{"step": 3}\n', b'[1]\n{"step": 1}\n', b'\xff\xfe\n{"step": 1}\n'):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r'metrics\.jsonl: line \d is damaged; delete that line'):
            MetricsLog(tmp_path, start=1, steps=3)


def test_samples_of_an_evaluation_reach_the_board(tmp_path):
    """Both kinds are images that any viewer opens; a moving one has every second frame."""
    frames = np.random.default_rng(0).integers(0, 255, (9, 64, 96, 3), np.uint8)
    (tmp_path / 'samples').mkdir()
    video.write_mp4(tmp_path / 'samples' / '000.mp4', frames)
    video.write_contact_sheet(tmp_path / 'samples' / '000.png', frames)
    with MetricsLog(tmp_path, start=0, steps=10, progress=False) as log:
        log.show(7, tmp_path / 'samples')
        log.show(8, tmp_path / 'nothing')
    (path,) = (tmp_path / 'tensorboard').glob('events*')
    events = [Event.FromString(bytes(record)) for record in records(path.read_bytes())]
    shown = {value.tag: value.image for event in events for value in event.summary.value}
    assert shown.keys() == {'samples/000', 'videos/000'}
    assert {event.step for event in events if event.summary.value} == {7}
    moving, still = (Image.open(io.BytesIO(shown[name].encoded_image_string)) for name in ('videos/000', 'samples/000'))
    assert (moving.format, moving.n_frames, moving.size) == ('GIF', 5, (96, 64))
    assert (still.format, still.size) == ('PNG', (shown['samples/000'].width, shown['samples/000'].height))


def records(content: bytes) -> Iterator[bytes]:
    """Yield the records of an event file: length, checksum, bytes, checksum."""
    while content:
        (length,) = struct.unpack('<Q', content[:8])
        yield content[12 : 12 + length]
        content = content[16 + length :]
