"""The benchmark's report: targets, every system's numbers, pictures and curves; in Markdown and in HTML."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import platform
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from markdown_it import MarkdownIt

from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.json_file import read_json
from train.benchmark.chain import Chain
from train.benchmark.common import common
from train.benchmark.continuation import Continuation
from train.benchmark.cosine_term import CosineTerm, cosine_curves, cosine_table
from train.benchmark.evidence import GIVEN, SECOND, Evidence, Target
from train.benchmark.figures import Curves, Rows, draw_training, save
from train.benchmark.first_frame import first_frame_rows, first_frame_table
from train.benchmark.motion import motion_curves, motion_table
from train.benchmark.recipes import recipe_rows, recipe_table
from train.benchmark.record import recorded_changes, recorded_start
from train.benchmark.recovery import Recovery, recovery_curves, recovery_table
from train.benchmark.statistics import Estimator
from train.benchmark.students import ONE_STEP
from train.benchmark.targets import GIVEN_TOO, gather, targets
from train.shapes.attributes import NUMBERS, Estimate
from train.shapes.world import WORLDS, Traits

COLUMNS = (*Traits._fields, 'all', SECOND, *NUMBERS)
STYLE = (
    'body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}table{border-collapse:collapse;'
    'font-size:13px}td,th{border:1px solid #ccc;padding:.2em .6em}img{max-width:100%;image-rendering:pixelated}'
    'pre{background:#f4f4f4;padding:1em}'
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A target, its value in each seed, and the estimate over all of them."""

    target: Target
    seeds: tuple[float, ...]
    estimate: Estimate

    @property
    def shown(self) -> str:
        """The estimate as text."""
        return f'{self.estimate.mean:.3f}' if self.target.exact else str(self.estimate)

    @property
    def verdict(self) -> str:
        """Return the verdict; a value within two standard errors of a bound is "within the error"."""
        mean, error = self.estimate
        reached = self.target.reached(mean)
        if reached is None:
            return ''
        said = 'yes' if reached else '**no**'
        if self.target.exact:
            return said
        if math.isnan(error):
            return f'{said}, error unknown'
        bounds = [bound for bound in (self.target.least, self.target.most) if bound is not None]
        return f'{said}, within the error' if any(abs(mean - bound) < 2 * error for bound in bounds) else said


def write(chains: Sequence[Chain]) -> int:
    """Write report.md, report.html, report.json and verdicts.md of all seeds; return how many targets were missed."""
    out = chains[0].out
    seen, left_out = common(chains, [gather(chain) for chain in chains])
    if left_out:
        print(named(left_out))
    # The targets need the first one, which is shipped.
    chain = chains[0].with_students(
        [*chains[0].students[:1], *(one for one in chains[0].students[1:] if one not in left_out)]
    )
    estimate = Estimator(seen, WORLDS[chain.tier.world])
    rows = [
        Row(target, tuple(target.value(evidence) for evidence in seen), estimate(target.value))
        for target in targets(chain)
    ]
    for folder in (out, *(chain.folder for chain in chains)):
        for run in sorted(path.parent for path in folder.glob('*/metrics.jsonl')):
            draw_training(run / 'metrics.jsonl', folder / 'curves' / f'{run.name}.png')
    text = '\n'.join(
        [
            *head(chains, left_out),
            '## Targets',
            '',
            *target_table(rows),
            '',
            *tier_section(chain, seen, estimate),
            *(system_sections(seen, estimate, out) if seen[0].results else ()),
            *pictures(chain, seen[0].results),
            *seconds(chains),
        ]
    )
    html = MarkdownIt('commonmark').enable('table').render(text)
    page = f'<!doctype html><meta charset="utf-8"><title>Moving shapes</title><style>{STYLE}</style>{html}'
    for name, content in {
        'report.md': text + '\n',
        'report.html': page,
        'report.json': json.dumps(_to_json(rows, seen), indent=1),
        'verdicts.md': '\n'.join(verdict_table(rows)) + '\n',
    }.items():
        with atomic_file(out / name) as path:
            path.write_text(content)
    return sum(row.target.reached(row.estimate.mean) is False for row in rows)


def _known(value: float) -> float | None:
    """Return a number for JSON, which has no NaN."""
    return None if math.isnan(value) else value


def named(left_out: Mapping[str, str]) -> str:
    """Return what is left out of a report, and why, as a sentence."""
    return f'Left out: {"; ".join(f"{name} ({why})" for name, why in left_out.items())}.'


def _to_json(rows: Sequence[Row], seen: Sequence[Evidence]) -> dict[str, Any]:
    """Return the report's numbers."""
    numbers = {
        row.target.name: {
            'target': row.target.bounds,
            'seeds': [_known(value) for value in row.seeds],
            'mean': _known(row.estimate.mean),
            'error': _known(row.estimate.error),
            'verdict': row.verdict,
        }
        for row in rows
    }
    return {'targets': numbers, 'systems': [evidence.results for evidence in seen]}


def head(chains: Sequence[Chain], left_out: Mapping[str, str]) -> list[str]:
    """Return the title, the setting, and how to read the errors.

    Args:
      left_out: systems that are not in the report -> why, see `common`.
    """
    tier, out = chains[0].tier, chains[0].out
    lines = [
        f'World {tier.world}, {tier.frames} frames of {tier.height}x{tier.width}; {tier.captions} captions of '
        f'combinations that were never trained on; seeds {", ".join(str(chain.seed) for chain in chains)}. '
        f'{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}. {errors_of(len(chains))}'
    ]
    if isinstance(chains[0], Continuation):
        start = recorded_start(out) or f'{chains[0].start} (not recorded when the folder was begun)'
        lines.append(f'Continued from {start}.')
    lines += [f'Settings of {step}: {" ".join(given)}' for step, given in recorded_changes(out).items()]
    if left_out:
        lines.append(named(left_out))
    return ['# The benchmark on moving shapes', *(text for line in lines for text in ('', line)), '']


def errors_of(seeds: int) -> str:
    """Return what the errors of a report contain."""
    shown = (
        'Errors are standard errors: clips are clustered by what their caption tells; a share of 0 or 1 has at least '
    )
    shown += 'that of one wrong caption'
    if seeds > 1:
        return f"{shown}; seeds count as random, and their part is widened by Student's t."
    return f'{shown}. With one seed, they contain no variation of training, and numbers without clips have none.'


def target_table(rows: Sequence[Row]) -> list[str]:
    """Return a row per target: the mean over seeds with its standard error, the extremes, and the verdict."""
    lines = ['| quantity | target | mean over seeds | lowest to highest | reached |', '|---|---|---:|---:|---|']
    for row in rows:
        spread = f'{min(row.seeds):.3f} to {max(row.seeds):.3f}' if len(row.seeds) > 1 else ''
        lines.append(f'| {row.target.name} | {row.target.bounds} | {row.shown} | {spread} | {row.verdict} |')
    return lines


def tier_section(chain: Chain, seen: Sequence[Evidence], estimate: Estimator) -> list[str]:
    """Return the section that belongs to the tier, with its figure; none for most."""
    out = chain.out
    if isinstance(chain, CosineTerm):
        return with_figure(cosine_table(seen, estimate), cosine_curves(seen, estimate), out)
    if isinstance(chain, Recovery):
        return with_figure(recovery_table(seen, estimate), recovery_curves(estimate), out)
    tier, world = chain.tier, WORLDS[chain.tier.world]
    if world.omitted:
        return with_figure(
            motion_table(seen, estimate, world, tier.units), motion_curves(seen, estimate, tier.units), out
        )
    if not set(ONE_STEP) <= set(chain.students):
        return []
    shown = chain.students, chain.sampled_teacher
    return with_figure(recipe_table(seen, estimate, *shown), recipe_rows(estimate, *shown), out)


def with_figure(section: Sequence[str], numbers: Curves | Rows, out: pathlib.Path) -> list[str]:
    """Draw the numbers of a section into `out/figures`; return the section with the figure below its title."""
    title = section[0].removeprefix('## ')
    path = pathlib.Path('figures', re.sub(r'\W+', '_', title).lower() + '.png')
    save(numbers.figure(), out / path)
    return [section[0], '', f'![{title}]({path.as_posix()})', *section[1:]]


def verdict_table(rows: Sequence[Row]) -> list[str]:
    """Return a row per target, with generated and given first frames side by side."""
    by_name = {row.target.name: row for row in rows}
    lines = [
        '| quantity | target | first frame generated | reached | first frame given | reached |',
        '|---|---|---:|---|---:|---|',
    ]
    for name, row in by_name.items():
        if name.endswith(GIVEN_TOO):
            continue
        given = by_name.get(name + GIVEN_TOO)
        cells = f'{given.shown} | {given.verdict}' if given else ' | '
        lines.append(f'| {name} | {row.target.bounds} | {row.shown} | {row.verdict} | {cells} |')
    return lines


def system_sections(seen: Sequence[Evidence], estimate: Estimator, out: pathlib.Path) -> list[str]:
    """Return the sections on all systems that generate videos."""
    given = any(name.endswith(f'/{GIVEN}') for name in seen[0].results)
    first = with_figure(first_frame_table(seen, estimate), first_frame_rows(seen, estimate), out) if given else []
    return [*first, '## Every system', '', *system_table(seen, estimate), '']


def system_table(seen: Sequence[Evidence], estimate: Estimator) -> list[str]:
    """Return a row per system with the means over seeds and their errors; older results lack the second reader."""
    lines = [f'| system / first frame | {" | ".join(COLUMNS)} |', f'|---{"|---:" * len(COLUMNS)}|']
    for name in seen[0].results:
        of = lambda column, name=name: estimate(lambda evidence: evidence.results[name][column][0])
        known = lambda column, name=name: all(column in evidence.results[name] for evidence in seen)
        values = (of(column) if known(column) else '' for column in COLUMNS)
        lines.append(f'| {name} | {" | ".join(map(str, values))} |')
    return lines


def pictures(chain: Chain, shown: Collection[str]) -> list[str]:
    """Return the contact sheets of a seed, and the curves of its trainings and of those that all seeds share.

    Args:
      shown: names of the results in the report; a sheet of another one may be of earlier weights.
    """
    folder = chain.folder / 'evaluation'
    sheets = {path.relative_to(folder).with_suffix('').as_posix(): path for path in sorted(folder.rglob('*.png'))}
    sheets = {name: path for name, path in sheets.items() if name in shown}
    lines = ['## Videos', '', 'The same captions in every picture, a video per row.', ''] if sheets else []
    for name, path in sheets.items():
        lines += [f'{name}:', '', f'![{name}]({path.relative_to(chain.out)})', '']
    lines += ['## Curves', '']
    for folder in (chain.out, chain.folder):
        for path in sorted((folder / 'curves').glob('*.png')):
            lines += [f'![{path.stem}]({path.relative_to(chain.out)})', '']
    return lines


def seconds(chains: Sequence[Chain]) -> list[str]:
    """Return the duration of every step."""
    times: list[Mapping[str, float]] = [
        read_json(chain.folder / 'times.json', dict[str, float]) if (chain.folder / 'times.json').is_file() else {}
        for chain in chains
    ]
    titles = [f'seed {chain.seed}' for chain in chains]
    lines = ['## Seconds', '', f'| step | {" | ".join(titles)} |', f'|---{"|---:" * len(titles)}|']
    for name in dict.fromkeys(name for row in times for name in row):
        lines.append(f'| {name} | {" | ".join(f"{row[name]:.0f}" if name in row else "" for row in times)} |')
    lines.append(f'| all | {" | ".join(f"{sum(row.values()):.0f}" for row in times)} |')
    return [*lines, '', 'The autoencoder, scenes and latents are made once, in the first seed.']
