"""The benchmark's report: targets, every system's numbers, pictures and curves; in Markdown and in HTML."""

from __future__ import annotations

import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
from markdown_it import MarkdownIt

from neodragon_jax.base.atomic import atomic_file
from train.benchmark.chain import Chain
from train.benchmark.targets import Evidence, Target, gather, targets
from train.shapes.attributes import NUMBERS
from train.shapes.world import Traits

COLUMNS = (*Traits._fields, 'all', *NUMBERS)
# Curves of every program's loss, and of what its evaluations found.
CURVES = ('loss', 'eval/validation', 'eval/psnr', 'fake_mse', 'cauchy')
STYLE = (
    'body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}table{border-collapse:collapse;'
    'font-size:13px}td,th{border:1px solid #ccc;padding:.2em .6em}img{max-width:100%;image-rendering:pixelated}'
    'pre{background:#f4f4f4;padding:1em}'
)


def write(chains: Sequence[Chain]) -> int:
    """Write report.md, report.html and report.json of all seeds; return how many targets were missed."""
    out = chains[0].out
    seen = [gather(chain) for chain in chains]
    rows = [(target, [target.value(evidence) for evidence in seen]) for target in targets(chains[0])]
    missed = sum(target.reached(float(np.mean(values))) is False for target, values in rows)
    for chain in chains:
        for run in sorted(path.parent for path in chain.folder.glob('*/metrics.jsonl')):
            draw_curves(run / 'metrics.jsonl', chain.folder / 'curves' / f'{run.name}.png')
    text = '\n'.join(
        [
            *head(chains),
            '## Targets',
            '',
            *target_table(rows),
            '',
            '## Every system',
            '',
            *system_table(seen),
            '',
            *pictures(chains[0]),
            *seconds(chains),
        ]
    )
    html = MarkdownIt('commonmark').enable('table').render(text)
    page = f'<!doctype html><meta charset="utf-8"><title>Moving shapes</title><style>{STYLE}</style>{html}'
    numbers = {target.what: {'asked': target.asked, 'seeds': values} for target, values in rows}
    for name, content in {
        'report.md': text + '\n',
        'report.html': page,
        'report.json': json.dumps({'targets': numbers, 'systems': [evidence.results for evidence in seen]}, indent=1),
    }.items():
        with atomic_file(out / name) as path:
            path.write_text(content)
    return missed


def head(chains: Sequence[Chain]) -> list[str]:
    """Return the title, and what the numbers are of."""
    tier = chains[0].tier
    return [
        '# The benchmark on moving shapes',
        '',
        f'World {tier.world}, {tier.frames} frames of {tier.height}x{tier.width}; {tier.captions} captions of '
        f'combinations that were never trained on; seeds {", ".join(str(chain.seed) for chain in chains)}. '
        f'{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}.',
        '',
    ]


def target_table(rows: Sequence[tuple[Target, Sequence[float]]]) -> list[str]:
    """Return a row per target: the mean over seeds, its extremes, and the verdict."""
    words = {True: 'yes', False: '**no**', None: ''}
    lines = ['| what | asked | mean of the seeds | least to most | reached |', '|---|---|---:|---:|---|']
    for target, values in rows:
        mean = float(np.mean(values))
        spread = f'{min(values):.3f} to {max(values):.3f}' if len(values) > 1 else ''
        lines.append(f'| {target.what} | {target.asked} | {mean:.3f} | {spread} | {words[target.reached(mean)]} |')
    return lines


def system_table(seen: Sequence[Evidence]) -> list[str]:
    """Return a row per system with the means over seeds; of a single seed with standard errors over captions."""
    lines = [f'| system / first frame | {" | ".join(COLUMNS)} |', f'|---{"|---:" * len(COLUMNS)}|']
    for name in seen[0].results:
        cells = [_cell([evidence.results[name][column] for evidence in seen]) for column in COLUMNS]
        lines.append(f'| {name} | {" | ".join(cells)} |')
    return lines


def _cell(estimates: Sequence[Sequence[float]]) -> str:
    mean = float(np.mean([estimate[0] for estimate in estimates]))
    return f'{mean:.3f}' + (f' ± {estimates[0][1]:.3f}' if len(estimates) == 1 else '')


def pictures(chain: Chain) -> list[str]:
    """Return the contact sheets and curves of a seed."""
    lines = ['## Videos', '', 'The same captions in every picture, a video per row.', '']
    for path in sorted((chain.folder / 'evaluation').rglob('*.png')):
        name = path.relative_to(chain.folder / 'evaluation').with_suffix('')
        lines += [f'{name}:', '', f'![{name}]({path.relative_to(chain.out)})', '']
    lines += ['## Curves', '']
    for path in sorted((chain.folder / 'curves').glob('*.png')):
        lines += [f'![{path.stem}]({path.relative_to(chain.out)})', '']
    return lines


def seconds(chains: Sequence[Chain]) -> list[str]:
    """Return how long every step took."""
    times: list[Mapping[str, float]] = [
        json.loads((chain.folder / 'times.json').read_text()) if (chain.folder / 'times.json').is_file() else {}
        for chain in chains
    ]
    titles = [f'seed {chain.seed}' for chain in chains]
    lines = ['## Seconds', '', f'| step | {" | ".join(titles)} |', f'|---{"|---:" * len(titles)}|']
    for name in dict.fromkeys(name for row in times for name in row):
        lines.append(f'| {name} | {" | ".join(f"{row[name]:.0f}" if name in row else "" for row in times)} |')
    lines.append(f'| all | {" | ".join(f"{sum(row.values()):.0f}" for row in times)} |')
    return [*lines, '', 'Codec, scenes and latents are made once, in the first seed.']


def draw_curves(metrics: pathlib.Path, out: pathlib.Path) -> None:
    """Draw what a program logged over its steps."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text().splitlines()]
    curves = {name: [(row['step'], row[name]) for row in rows if row.get(name) is not None] for name in CURVES}
    shown = {name: points for name, points in curves.items() if points}
    if not shown:
        return
    figure = matplotlib.figure.Figure(figsize=(4 * len(shown), 2.6), layout='constrained')
    for place, (name, points) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(1, len(shown), place, title=f'{metrics.parent.name}: {name}', xlabel='step')
        axes.plot(*zip(*points, strict=True))
        axes.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as path:
        figure.savefig(path, format='png', dpi=100)
