"""The denoiser's shipped form against a straightforward export of it, for the report; see compare_stage.py."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from export import compare_stage
from export.graphs.denoiser import FORMS, Form
from export.graphs.table import DENOISER
from export.steps.graph import Settings, kept_or_made, makers
from neodragon_jax.base.errors import InputError
from neodragon_jax.config.neodragon import MMDiTConfig

FOLDER = 'denoiser-compare'
GRAPHS = 4  # two forms, each with one block and with two


@dataclasses.dataclass(frozen=True)
class Subject:
    """The largest stage of a denoiser: its sizes, and the form that it is exported in."""

    config: MMDiTConfig
    size: compare_stage.Size
    form: Form

    @property
    def stage(self) -> int:
        """The last stage, which takes most of the time."""
        return self.size.stages - 1


def check(names: Sequence[str], subject: Subject) -> None:
    """Raise InputError if what is exported cannot be compared."""
    if f'{DENOISER}{subject.stage}' not in names:
        raise InputError(f'--compare is about {DENOISER}{subject.stage}, which --graphs leaves out; name it too.')
    if subject.config.num_layers < 2:
        raise InputError('--compare takes a denoiser of two blocks or more; leave it out for this one.')


def compare(subject: Subject, settings: Settings, on_step: Callable[[str], object]) -> list[str]:
    """Build both forms for the first chipset, unless that is done; return the report's lines.

    Args:
      on_step: called with the name of each finished graph.
    """
    target = settings.targets[0]
    sizes = {**dataclasses.asdict(subject.config), **dataclasses.asdict(subject.size)}
    source = {'sizes': sizes, 'form': dataclasses.asdict(subject.form), 'chipset': target.chipset} | makers()
    built: list[str] = []

    def report(text: str) -> None:
        built.append(text)
        on_step(text)

    write = functools.partial(_write, subject, settings, report)
    folder = settings.out / f'{FOLDER}-{target.chipset}'
    lines = kept_or_made(folder, _as_json(source), write)['lines']
    for _ in range(GRAPHS - len(built)):
        on_step('compared before')
    return lines


def _write(
    subject: Subject, settings: Settings, on_graph: Callable[[str], object], folder: pathlib.Path
) -> dict[str, Any]:
    """Write compare.md and compare.json; return the lines for the report."""
    config, target, stage = subject.config, settings.targets[0], subject.stage
    plain = dataclasses.replace(FORMS[compare_stage.BASELINE], draws_frame_zero=subject.form.draws_frame_zero)
    forms = {compare_stage.BASELINE: plain, 'exported here': subject.form}
    built = compare_stage.compare(config, forms, stage, target, config.num_layers, subject.size, on_graph)
    base, best = rows = list(built)
    about = {'stage': stage, 'blocks': config.num_layers, 'soc': target.chipset}
    compare_stage.write(folder, rows, about)
    saved = compare_stage.savings(base, best)
    lines = [
        f'## Stage {stage} of the denoiser against a straightforward export',
        '',
        f'For {target.chipset}, W8A16, random weights, on which the counts do not depend; latencies are ESTIMATES for',
        f'a Snapdragon 8 Elite. What is exported here moves {saved["bytes moved"]:.1%} fewer bytes and has',
        f'{saved["weights"]:.1%} fewer weights.',
        '',
        *compare_stage.HEADER.splitlines(),
        *map(compare_stage.table_line, rows),
    ]
    return {'lines': lines}


def _as_json(source: dict[str, Any]) -> dict[str, Any]:
    """Return it as it is read back: tuples are lists there."""

    return json.loads(json.dumps(source))
