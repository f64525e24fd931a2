"""Bar chart of the importance of all blocks: a pair of bars per block, pale for removed blocks."""

from __future__ import annotations

from collections.abc import Collection

from train.pruning.importance import Importance

COLORS = {'image': '#2b6cb0', 'text': '#c05621'}
BAR, GAP, HEIGHT, LEFT, TOP, BOTTOM = 9, 8, 200, 56, 30, 40
PALE = 0.3


def importance_svg(importance: Importance, removed: Collection[int] = ()) -> str:
    """Return the chart as an SVG document."""
    scores = {'image': importance.image, 'text': importance.text}
    highest = max(float(values.max()) for values in scores.values() if values.size) or 1.0
    width = LEFT + importance.blocks * (2 * BAR + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{TOP + HEIGHT + BOTTOM}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for tenth in range(0, 11, 2):
        y = TOP + HEIGHT * (1 - tenth / 10)
        parts.append(f'<line x1="{LEFT}" x2="{width - GAP}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 4, y + 4, f'{highest * tenth / 10:.3g}', 'end'))
    for block in range(importance.blocks):
        left = LEFT + GAP + block * (2 * BAR + GAP)
        parts.append(_text(left + BAR, TOP + HEIGHT + 14, str(block)))
        for place, (stream, values) in enumerate(scores.items()):
            if block < len(values):
                height = HEIGHT * max(float(values[block]), 0) / highest
                title = f'block {block}, {stream}: {values[block]:.5f}'
                parts.append(_bar(left + place * BAR, height, COLORS[stream], PALE if block in removed else 1, title))
    for place, (stream, color) in enumerate(COLORS.items()):
        x = LEFT + GAP + 90 * place
        parts.append(f'<rect x="{x}" y="10" width="10" height="10" fill="{color}"/>')
        parts.append(_text(x + 14, 19, f'{stream} tokens', 'start'))
    parts.append(
        _text(LEFT, TOP + HEIGHT + 32, '1 - cos(tokens before, tokens after) by block; pale: removed', 'start')
    )
    return '\n'.join([*parts, '</svg>', ''])


def _text(x: float, y: float, text: str, anchor: str = 'middle') -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _bar(left: float, height: float, color: str, opacity: float, title: str) -> str:
    """Return a bar that stands on the axis, with a tooltip."""
    return (
        f'<rect x="{left}" y="{TOP + HEIGHT - height:.2f}" width="{BAR}" '
        f'height="{height:.2f}" fill="{color}" opacity="{opacity}"><title>{title}</title></rect>'
    )
