"""The picture of a report: a bar for every graph's ratio, a mark at its target."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

LABELS, BARS, LINE, MARGIN, TEXT = 330, 480, 22, 12, 13
HIGHEST = 80.0  # dB at the right end; what is higher is drawn to there, with its number
MET, MISSED, TARGET, INK = '#2a7f9e', '#c0392b', '#202020', '#202020'


def draw_ratios(rows: Sequence[tuple[str, float | None, float]]) -> Image.Image:
    """Return a bar chart.

    Args:
      rows: label, ratio in dB (None: not measured), and target in dB of each.
    """
    size = (LABELS + BARS + 6 * MARGIN, (len(rows) + 1) * LINE + 2 * MARGIN)
    picture = Image.new('RGB', size, 'white')
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT)
    draw.text((MARGIN, MARGIN), 'dB against JAX in float32; the line is the target', INK, font)
    for number, (label, ratio, target) in enumerate(rows, 1):
        top = MARGIN + number * LINE
        draw.text((MARGIN, top), label, INK, font)
        if ratio is None:
            draw.text((LABELS, top), 'not measured', INK, font)
        else:
            end = _place(ratio)
            draw.rectangle((LABELS, top, end, top + LINE - 6), fill=MET if ratio >= target else MISSED)
            draw.text((end + 4, top), f'{ratio:.1f}', INK, font)
        draw.line((_place(target), top - 2, _place(target), top + LINE - 4), TARGET, 2)
    return picture


def _place(ratio: float) -> float:
    """Return where a ratio is, in pixels from the left."""
    return LABELS + BARS * min(max(ratio, 0.0), HIGHEST) / HIGHEST
