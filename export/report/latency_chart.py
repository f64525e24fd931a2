"""The second picture of a report: estimated latencies with their error band, and the measured graphs behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from export.qnn.latency import MEASURED, Estimate, Measured
from export.report.rows import Row

LABELS, BARS, LINE, MARGIN, TEXT = 330, 480, 22, 12, 13
# Ends of the logarithmic axis in milliseconds; values beyond an end are drawn there.
LOWEST, HIGHEST = 0.01, 10_000.0
BAND, ESTIMATE, MEASUREMENT, INK = '#9ecae1', '#2a7f9e', '#c0392b', '#202020'
_LEGENDS = (
    'ms on a Snapdragon 8 Elite, ESTIMATED: line = estimate, bar = error band (logarithmic axis)',
    'measured graphs that the estimate is fitted to: dot = measured on a device',
)


class _Line(NamedTuple):
    """One line of the chart; `estimated` as returned by `Estimate.to_json`."""

    label: str
    estimated: Mapping[str, float]
    measured_ms: float | None = None


def draw_latencies(rows: Sequence[Row]) -> Image.Image:
    """Return a chart with the estimate of every graph, followed by the measured graphs with their own estimates."""
    own = {(row.graph, row.precision): _Line(f'{row.graph}, {row.precision}', row.estimated_ms) for row in rows}
    fitted = [_fitted_line(graph) for graph in MEASURED]
    size = (LABELS + BARS + 6 * MARGIN, (len(own) + len(fitted) + 2) * LINE + 3 * MARGIN)
    picture = Image.new('RGB', size, 'white')
    draw, font, top = ImageDraw.Draw(picture), ImageFont.load_default(TEXT), MARGIN
    for legend, lines in zip(_LEGENDS, (list(own.values()), fitted), strict=True):
        draw.text((MARGIN, top), legend, INK, font)
        for line in lines:
            top += LINE
            _draw_line(draw, font, line, top)
        top += LINE + MARGIN
    return picture


def _fitted_line(graph: Measured) -> _Line:
    """Return the line of a measured graph."""
    label = f'{graph.source}, full-size denoiser_stage{graph.stage}'
    return _Line(label, Estimate(math.nan, graph.by_operation_ms).to_json(), graph.ms)


def _draw_line(
    draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, line: _Line, top: int
) -> None:
    low, middle, high = (_place(line.estimated[name]) for name in ('low_ms', 'ms', 'high_ms'))
    draw.text((MARGIN, top), line.label, INK, font)
    draw.rectangle((low, top, high, top + LINE - 6), fill=BAND)
    draw.line((middle, top, middle, top + LINE - 6), ESTIMATE, 3)
    text = _number(line.estimated['ms'])
    if line.measured_ms is not None:
        draw.circle((_place(line.measured_ms), top + (LINE - 6) // 2), 5, MEASUREMENT, INK)
        text += f', measured {_number(line.measured_ms)}'
    # On the left of the band where it ends close to the picture's edge.
    width = draw.textlength(text, font)
    fits = high + 8 + width < LABELS + BARS + 6 * MARGIN
    draw.text((high + 8 if fits else low - 8 - width, top), text, INK, font)


def _number(ms: float) -> str:
    return f'{ms:.0f}' if ms >= 100 else f'{ms:.3g}'


def _place(ms: float) -> float:
    """Return the horizontal position of a latency in pixels."""
    share = math.log(min(max(ms, LOWEST), HIGHEST) / LOWEST) / math.log(HIGHEST / LOWEST)
    return LABELS + BARS * share
