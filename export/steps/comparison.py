"""Comparison of the denoiser's last stage with a straightforward export of it, for the report."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from export.graphs.denoiser import FORMS, Form
from export.graphs.table import DENOISER
from export.host.denoiser_graphs import DenoiserGraphs
from export.steps.code_identity import made_by
from export.steps.form_table import HEADER, savings, table_line, write_forms
from export.steps.forms import BASELINE, FormRow, StageSizes, compare_forms
from export.steps.options import GraphOptions
from export.steps.step_cache import finished_or_made
from neodragon_jax.base.errors import InputError
from neodragon_jax.config.neodragon import MMDiTConfig

FOLDER = 'denoiser-compare'
GRAPHS = 4  # two forms, each with one and with two blocks


@dataclasses.dataclass(frozen=True)
class Subject:
    """The last stage of a denoiser, which dominates the run time: its sizes and its exported form."""

    config: MMDiTConfig
    sizes: StageSizes
    form: Form

    @property
    def stage(self) -> int:
        """Number of the stage."""
        return self.sizes.stages - 1


def subject_of(denoiser: DenoiserGraphs) -> Subject:
    """Return the last stage of a denoiser."""
    sizes = StageSizes(denoiser.stages, denoiser.plan.frames - 1, denoiser.grid, denoiser.text_tokens)
    return Subject(denoiser.config, sizes, denoiser.form)


def check(names: Sequence[str], subject: Subject) -> None:
    """Raise InputError if the exported graphs cannot be compared."""
    if f'{DENOISER}{subject.stage}' not in names:
        raise InputError(f'--compare is about {DENOISER}{subject.stage}, which --graphs leaves out; name it too.')
    if subject.config.num_layers < 2:
        raise InputError('--compare takes a denoiser of two blocks or more; leave it out for this one.')


def compare(subject: Subject, options: GraphOptions, on_step: Callable[[str], object]) -> list[str]:
    """Build both forms for the first chipset unless they are finished; return the report's lines.

    Args:
      on_step: called with one line per finished graph.
    """
    chipset = options.targets[0].chipset
    built: list[str] = []

    def on_graph(text: str) -> None:
        built.append(text)
        on_step(text)

    write = functools.partial(_write, subject, options, on_graph)
    source = _source(subject, chipset) | made_by(__name__)
    lines = finished_or_made(options.out / f'{FOLDER}-{chipset}', source, write)['lines']
    for _ in range(GRAPHS - len(built)):
        on_step('compared before')
    return lines


def _source(subject: Subject, chipset: str) -> dict[str, Any]:
    """Return the settings that the result depends on."""
    sizes = {**dataclasses.asdict(subject.config), **dataclasses.asdict(subject.sizes)}
    return {'sizes': sizes, 'form': dataclasses.asdict(subject.form), 'chipset': chipset}


def _write(
    subject: Subject, options: GraphOptions, on_graph: Callable[[str], object], folder: pathlib.Path
) -> dict[str, Any]:
    """Write compare.md and compare.json; return metadata: the lines for the report."""
    config, target, stage = subject.config, options.targets[0], subject.stage
    plain = dataclasses.replace(FORMS[BASELINE], supports_frame_zero=subject.form.supports_frame_zero)
    forms = {BASELINE: plain, 'exported here': subject.form}
    rows = list(compare_forms(config, forms, stage, target, config.num_layers, subject.sizes, on_graph))
    write_forms(folder, rows, {'stage': stage, 'blocks': config.num_layers, 'soc': target.chipset})
    return {'lines': _section(stage, target.chipset, rows)}


def _section(stage: int, chipset: str, rows: Sequence[FormRow]) -> list[str]:
    """Return the report's lines about the two forms, the straightforward one first."""
    saved = savings(*rows)
    return [
        f'## Stage {stage} of the denoiser against a straightforward export',
        '',
        f'For {chipset}, W8A16, random weights (the counts do not depend on them); latencies are ESTIMATES for',
        f'a Snapdragon 8 Elite. The exported form moves {saved["bytes moved"]:.1%} fewer bytes and has',
        f'{saved["weights"]:.1%} fewer weights.',
        '',
        *HEADER.splitlines(),
        *map(table_line, rows),
    ]
