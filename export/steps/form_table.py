"""Table of the forms of a stage, and the check of the savings required from the shipped form."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from export.steps.forms import BASELINE, RELEASED, FormRow
from neodragon_jax.base.atomic import atomic_file

# Requirements on the shipped form: least fractions of bytes and weights saved against the straightforward form, and the
# longest latency of the last stage in milliseconds.
LESS_BYTES, LESS_WEIGHTS, LATENCY_MS = 0.35, 0.30, 850.0

HEADER = (
    '| form | ops | moved MB | scores MB | transposes | weights MB | estimated ms (band) | QDQ SNR dB | '
    'quantize s | compile s | peak GB |\n|---|---|---|---|---|---|---|---|---|---|---|'
)


def table_line(row: FormRow) -> str:
    """Return the table line of a form."""
    counts, built = row.view.summary(), row.built
    cells = [
        row.form,
        counts['operations'],
        f'{counts["moved_mb"]:.0f}',
        f'{counts["score_mb"]:.0f}',
        f'{counts["transposes"]} / {counts["transposed_mb"]:.0f} MB',
        f'{counts["weights_mb"]:.0f}',
        str(row.estimate),
        f'{built.quantized_db:.1f}',
        f'{built.quantize_s:.0f}',
        f'{built.compile_s:.0f}',
        f'{built.compile_gb:.1f}',
    ]
    return f'| {" | ".join(map(str, cells))} |'


def savings(base: FormRow, best: FormRow) -> dict[str, float]:
    """Return the fractions of the base form's bytes and weights that another form saves."""
    return {
        'bytes moved': 1 - best.bytes_mb / base.bytes_mb,
        'weights': 1 - best.view.weights_mb / base.view.weights_mb,
    }


def verdict(rows: Sequence[FormRow], stage: int) -> list[str]:
    """Return one line per requirement on the last form against the straightforward one; a failed one ends in MISSED."""
    by_name = {row.form: row for row in rows}
    if BASELINE not in by_name or rows[-1].form == BASELINE:
        return []
    best = rows[-1]
    saved = savings(by_name[BASELINE], best)
    checks = [('bytes moved', LESS_BYTES), ('weights', LESS_WEIGHTS)]
    lines = [
        f'{best.form} against {BASELINE}: {kind} {saved[kind]:.1%} less, required {least:.0%}'
        + ' MISSED' * (saved[kind] < least)
        for kind, least in checks
    ]
    if stage == RELEASED.stages - 1:
        worst = best.estimate.worst_ms
        line = f'{best.form}: estimated latency {worst:.0f} ms by the worse model, required {LATENCY_MS:.0f} ms'
        lines.append(line + ' MISSED' * (worst > LATENCY_MS))
    return lines


def write_forms(folder: pathlib.Path, rows: Sequence[FormRow], settings: Mapping[str, Any]) -> None:
    """Write compare.md and compare.json.

    Args:
      settings: JSON values for the record; `stage`, `blocks` and `soc` are in the title.
    """
    lines = [
        f'# Stage {settings["stage"]} of the denoiser, {settings["blocks"]} blocks, {settings["soc"]}',
        '',
        'Counted in the graphs that QNN compiled; latencies are estimates for a Snapdragon 8 Elite, see '
        'export/qnn/latency.py. Counts and estimates are those of the whole model, extrapolated from graphs of one and '
        'of two blocks; SNR (signal-to-noise ratio), times and memory are those of the two blocks. Weights are random, '
        'and calibration sees the one random call that the SNR is measured on: it shows the rounding error alone.',
        '',
        HEADER,
        *map(table_line, rows),
        '',
        *(f'* {line}' for line in verdict(rows, settings['stage'])),
        '',
    ]
    with atomic_file(folder / 'compare.json') as path:
        values = {'settings': dict(settings), 'forms': [_values(row) for row in rows]}
        path.write_text(json.dumps(values, indent=2) + '\n')
    with atomic_file(folder / 'compare.md') as path:
        path.write_text('\n'.join(lines))


def _values(row: FormRow) -> dict[str, Any]:
    """Return a row as JSON values."""
    return {
        'form': row.form,
        **row.view.summary(),
        **dataclasses.asdict(row.estimate),
        'operations_by_kind': {kind: round(count) for kind, count in sorted(row.view.operations.items())},
        'moved_mb_by_kind': {kind: round(size, 2) for kind, size in sorted(row.view.output_mb.items())},
        **{key: value for key, value in dataclasses.asdict(row.built).items() if key != 'view'},
    }
