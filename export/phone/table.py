"""The table of a phone's measurements, beside the report of the export."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from export.phone.session import Measured
from neodragon_jax.base.atomic import atomic_file


def lines_of(measured: Measured) -> list[str]:
    """Return the table as Markdown."""
    before, after = (f'{value:.0f} °C' if value is not None else 'not shown' for value in measured.celsius)
    lines = [
        f'## {measured.model}, {measured.chipset}',
        '',
        'SNR (signal-to-noise ratio) against JAX of the last latent frame of the recorded video: '
        f'{measured.latents_db:.1f} dB. Hottest sensor: {before} before, {after} after.',
        '',
        '| graph | SNR dB | load ms | runs | min ms | median ms |',
        '|---|---|---|---|---|---|',
    ]
    for name, graph in measured.graphs.items():
        numbers = f'{graph.ratio_db:.1f} | {graph.load_ms:.0f} | {len(graph.run_ms)}'
        lines.append(f'| {name} | {numbers} | {min(graph.run_ms):.1f} | {graph.median_ms:.1f} |')
    return lines


def write(folder: pathlib.Path, measured: Measured) -> pathlib.Path:
    """Write device-{chipset}.md and .json; return the first."""
    path = folder / f'device-{measured.chipset}.md'
    with atomic_file(path) as draft:
        draft.write_text('\n'.join(lines_of(measured)) + '\n', encoding='utf-8')
    with atomic_file(path.with_suffix('.json')) as draft:
        draft.write_text(json.dumps(dataclasses.asdict(measured), indent=1) + '\n')
    return path
