"""The report of an export: tables, JSON values, and the picture of the ratios."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import ImageColor

from export.__main__ import parse_args
from export.host.protocol import Protocol
from export.host.recording import Scenes
from export.phone.session import GraphTimes, Measured
from export.phone.table import lines_of
from export.qnn.latency import MEASURED
from export.report.chart import LINE, MARGIN, MET, MISSED, PROMPT, draw_ratios
from export.report.latency_chart import BAND, BARS, ESTIMATE, MEASUREMENT, draw_latencies
from export.report.report import Report
from export.report.rows import SharedBinary, VideoRow
from export.steps.run import warnings_of
from neodragon_jax.generation.plan import make_plan
from support.export_rows import make_row


def test_the_target_is_judged_on_the_lowest_ratio():
    row = make_row(None)
    assert (row.lowest_db, row.median_db, row.deploy_db, row.met) == (40.0, 42.0, 40.0, True)
    assert make_row(31.0).deploy_db == 31.0 and make_row(45.0).deploy_db == 40.0
    good_but_one = dataclasses.replace(row, prompts_db={'a': 60.0, 'b': 60.0, 'c': 28.9})
    assert good_but_one.median_db == 60.0 and good_but_one.met is False
    report = Report([row, good_but_one], [], {})
    assert report.below_target == ['denoiser_stage0, w8a16, sm8750: 28.9 dB, target 29 dB']


def test_unmeasured_is_never_met(tmp_path):
    row = dataclasses.replace(make_row(None, 'fp16'), prompts_db={})
    report = Report([row], [], {})
    assert row.met is None and not report.below_target and report.not_measured == ['denoiser_stage0']
    report.write(tmp_path)
    assert '| not measured |' in (tmp_path / 'report.md').read_text()
    (values,) = json.loads((tmp_path / 'report.json').read_text())['graphs']
    assert values['met'] is None and values['deploy_db'] is None


def test_whole_videos_show_their_lowest_ratio(tmp_path):
    videos = [VideoRow('all graphs', 'CPU', {'a': 30.0, 'b': 21.4, 'c': 28.0}, {'a': 27.0}, {'a': 27.0, 'b': 25.0})]
    Report([make_row(31.0)], videos, {}, warnings=['Evaluated on 3 prompt(s) only']).write(tmp_path)
    text = (tmp_path / 'report.md').read_text()
    assert '| all graphs | CPU | 3 | 21.4 | 28.0 | 25.0 |' in text
    assert text.startswith('# Export report\n\n* **Evaluated on 3 prompt(s) only**\n\nSNR (signal-to-noise ratio)')


def test_the_measure_has_its_usual_name(capsys):
    """SNR, written out where it is first named; "ratio" alone does not tell of what."""
    rows = [dataclasses.replace(make_row(31.0), ranges_db={'minmax': 40.0}, rounding_db={'nearest': 40.0})]
    videos = [VideoRow('all graphs', 'CPU', {'a': 30.0}, {'a': 27.0}, {'a': 27.0})]
    scenes = [Scenes([name]) for name in 'abc']
    warnings = warnings_of(Protocol({}, *scenes, make_plan('hybrid', 9, 64, 64), {}, 1, {}))
    measured = Measured('Phone', 'sm8750', {'clip_l': GraphTimes(40.0, 1.0, (1.0,))}, 30.0, (None, None))
    with pytest.raises(SystemExit):
        parse_args(['--help'])
    for text in (
        Report(rows, videos, {}, warnings=warnings).markdown(),
        '\n'.join(lines_of(measured)),
        capsys.readouterr().out,
    ):
        flat, first = ' '.join(text.split()), 'SNR (signal-to-noise ratio)'
        assert flat.index('SNR') == flat.index(first)
        assert not re.search(r'(?i)\bratios?\b', flat.replace(first, ''))


def test_report_shows_costs_and_comparisons(tmp_path):
    binary = SharedBinary(['denoiser_stage0', 'denoiser_stage1'], 'w8a16', 'sm8750', 1.1, 2.0, 2.2, 3.0, 0.25)
    recording = [{'seconds': 60.0, 'peak_gb': 1.5}, {'seconds': 54.0, 'peak_gb': 1.25}]
    rows = [make_row(31.0), make_row(None)]
    Report(rows, [], {}, [binary], ['## Compared', '', 'more'], recording).write(tmp_path)
    text = (tmp_path / 'report.md').read_text()
    assert '| denoiser_stage0 | 40.0 | 39.0 |' in text and '| denoiser_stage0 | 33.0 | 39.0 |' in text
    assert '| 0.15 (0.09 to 0.25) | 0.4 + |' in text
    assert '| 1.0 / - | 2.0 / 0.50 | 0.5 / 0.20 + | - |' in text
    assert '| denoiser_stage0, denoiser_stage1 | w8a16 | sm8750 | 1.10 | 2.00 | 2.20 | 3.0 | 0.25 |' in text
    assert '\n## Compared\n' in text
    # Both rows are one graph: its steps count once, and the compile time is that of the binary.
    assert 'All steps: 2.0 minutes (recording 1.9, float graph 0.0, quantize 0.0, compile 0.1)' in text
    assert 'Recording took up to 1.5 GB.' in text
    values = json.loads((tmp_path / 'report.json').read_text())
    want = {'recording': 114.0, 'float graph': 1.0, 'quantize': 2.0, 'compile': 3.0, 'simulate': 0}
    assert values['step_seconds'] == want
    assert values['shared_binaries'][0]['separate_mb'] == 2.2 and values['graphs'][0]['met'] is True


def test_latencies_are_drawn_with_their_band_and_the_measured_graphs():
    """A measurement is within the band of its own estimate; precisions of a graph have a line each, chipsets do not."""
    one, other = make_row(None), dataclasses.replace(make_row(None, 'fp16'), estimated_ms={
        'ms': 10.0, 'low_ms': 1.0, 'high_ms': 100.0, 'flat_ms': 9.0, 'by_operation_ms': 8.0})  # fmt: skip
    pictures = [np.asarray(draw_latencies(rows)) for rows in ([one], [one, one, other])]
    assert len(pictures[1]) == len(pictures[0]) + LINE
    is_color = lambda picture, color: (picture == ImageColor.getrgb(color)).all(-1)
    band = is_color(pictures[1], BAND)[MARGIN + 2 * LINE + 3].nonzero()[0]
    assert band[-1] - band[0] == pytest.approx(BARS / 3, abs=2), 'two of the six decades of the axis'
    dots = is_color(pictures[0], MEASUREMENT)
    assert not dots[: MARGIN + 2 * LINE].any()
    for number in range(len(MEASURED)):
        line = slice(2 * MARGIN + (3 + number) * LINE, 2 * MARGIN + (4 + number) * LINE - 4)
        drawn = (is_color(pictures[0], BAND) | is_color(pictures[0], ESTIMATE))[line].any(0).nonzero()[0]
        dot = dots[line].any(0).nonzero()[0]
        assert drawn[0] - 6 <= dot.mean() <= drawn[-1] + 6


def test_chart_tells_met_from_missed():
    """Bars show the lowest ratio; they change color below the target and are absent if nothing was measured."""
    unmeasured = dataclasses.replace(make_row(None), prompts_db={})
    rows = [make_row(40.0), make_row(20.0, lowest_db=20.0), unmeasured]
    chart = np.asarray(draw_ratios([dataclasses.replace(row, target_db=29.0) for row in rows]))
    bars = [(chart == ImageColor.getrgb(color)).all(-1).any(0).nonzero()[0] for color in (MET, MISSED)]
    met, missed = (int(columns[-1] - columns[0]) for columns in bars)
    assert met == pytest.approx(2 * missed, abs=2)
    assert not (chart == ImageColor.getrgb(MISSED)).all(-1)[MARGIN + 3 * LINE :].any()
    dots = (chart == ImageColor.getrgb(PROMPT)).all(-1)
    assert dots[MARGIN + LINE : MARGIN + 3 * LINE].any() and not dots[MARGIN + 3 * LINE :].any()
