"""The picture of a report: for every graph its ratio on every evaluation prompt, the median, and the target."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from export.report.rows import Row

LABELS, BARS, LINE, MARGIN, TEXT = 330, 480, 22, 12, 13
HIGHEST = 80.0  # dB at the right end of the axis; higher ratios are drawn there, with their number
MET, MISSED, TARGET, INK, PROMPT = '#2a7f9e', '#c0392b', '#202020', '#202020', '#f2c14e'
_LEGEND = 'SNR in dB against JAX: bar = lowest, dots = evaluation prompts, ring = median, line = target'


def draw_ratios(rows: Sequence[Row]) -> Image.Image:
    """Return a chart with one bar per row, as long as its lowest ratio; red if the target is missed."""
    size = (LABELS + BARS + 6 * MARGIN, (len(rows) + 1) * LINE + 2 * MARGIN)
    picture = Image.new('RGB', size, 'white')
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT)
    draw.text((MARGIN, MARGIN), _LEGEND, INK, font)
    for number, row in enumerate(rows, 1):
        top = MARGIN + number * LINE
        draw.text((MARGIN, top), row.label, INK, font)
        if row.deploy_db is None:
            draw.text((LABELS, top), 'not measured', INK, font)
        else:
            _draw_bar(draw, font, row, row.deploy_db, top)
        draw.line((_place(row.target_db), top - 2, _place(row.target_db), top + LINE - 4), TARGET, 2)
    return picture


def _draw_bar(
    draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, row: Row, lowest: float, top: int
) -> None:
    end, middle = _place(lowest), top + (LINE - 6) // 2
    draw.rectangle((LABELS, top, end, top + LINE - 6), fill=MET if row.met else MISSED)
    right = max([end, *(_place(ratio) + 3 for ratio in row.prompts_db.values())])
    for ratio in row.prompts_db.values():
        draw.circle((_place(ratio), middle), 3, PROMPT, INK)
    if row.median_db is not None:
        draw.circle((_place(row.median_db), middle), 6, None, INK, 2)
    draw.text((right + 6, top), f'{lowest:.1f}', INK, font)


def _place(ratio: float) -> float:
    """Return the horizontal position of a ratio in pixels."""
    return LABELS + BARS * min(max(ratio, 0.0), HIGHEST) / HIGHEST
