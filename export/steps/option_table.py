"""Graphs compiled with several sets of compiler options: the binaries' sizes, times and counts, and their table."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

from export.graphs.denoiser import SHIPPED
from export.qnn.chipsets import Target
from export.qnn.compile import PRECISIONS, provider_options
from export.qnn.htp import HtpSession
from export.qnn.latency import Estimate, estimate
from export.qnn.static_view import dump_options, read_view
from export.steps.forms import RELEASED, quantize_stage, released_config
from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import file_sha256

_FINALIZATION = 'htp_graph_finalization_optimization_mode'
# Options of QNN's provider that affect a binary. Source: onnxruntime.ai/docs/execution-providers/QNN-ExecutionProvider.
VARIANTS: dict[str, dict[str, str]] = {
    'none': {},
    'finalization_1': {_FINALIZATION: '1'},
    'finalization_2': {_FINALIZATION: '2'},
    'finalization_3': {_FINALIZATION: '3'},
    'vtcm_8mb': {'vtcm_mb': '8'},
    'spill_fill': {'enable_htp_spill_fill_buffer': '1'},
    'float_inside': {'offload_graph_io_quantization': '0'},
}
HEADER = (
    '| graph | options | binary MB | same bytes as `none` | compile s | peak GB | operations | moved MB | '
    'estimated ms (band) |\n|---|---|---|---|---|---|---|---|---|'
)


@dataclasses.dataclass(frozen=True)
class OptionRow:
    """One graph compiled with one set of options.

    Attributes:
      binary_sha256: hash of the context binary; an option without effect leaves it unchanged.
      operations, moved_mb: counts of the graph that QNN dumps, before its finalization.
    """

    graph: str
    variant: str
    binary_mb: float
    binary_sha256: str
    compile_s: float
    peak_gb: float
    operations: int
    moved_mb: float
    estimate: Estimate
    same_as_none: bool | None


def precision_of(path: pathlib.Path) -> str:
    """Return the precision of a graph of an export, from the name of its folder.

    Raises:
      InputError: there is no such file, or its folder is not called {graph}-onnx-{precision}.
    """
    precision = path.parent.name.rpartition('-onnx-')[2]
    if not path.is_file() or precision not in PRECISIONS:
        raise InputError(f'{path}: not a graph of an export; give OUT/{{graph}}-onnx-{"|".join(PRECISIONS)}/….onnx.')
    return precision


def write_full_size_stage(stage: int, heads: int, out: pathlib.Path) -> pathlib.Path:
    """Write two blocks of a denoiser stage at its released size, with random weights; return the W8A16 graph.

    Args:
      heads: attention heads; the released denoiser has 24.
    """
    folder = out / f'denoiser_stage{stage}-onnx-w8a16'
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(released_config(heads), num_layers=2)
    return quantize_stage(config, SHIPPED, stage, RELEASED, folder).path


def compile_variants(graphs: Sequence[pathlib.Path], target: Target, variants: Sequence[str]) -> Iterator[OptionRow]:
    """Yield one row per graph and set of options.

    Raises:
      InputError: a graph does not compile.
    """
    for path in graphs:
        plain = None
        for variant in variants:
            row = _compile(path, target, variant, plain)
            plain = row.binary_sha256 if variant == 'none' else plain
            yield row


def _compile(path: pathlib.Path, target: Target, variant: str, plain: str | None) -> OptionRow:
    precision = precision_of(path)
    with tempfile.TemporaryDirectory() as scratch:
        dump, wrapper = pathlib.Path(scratch) / 'dump', pathlib.Path(scratch) / f'{path.stem}.onnx'
        dump.mkdir()
        options = provider_options(target, precision) | VARIANTS[variant] | dump_options(dump)
        with HtpSession(path, options, context=wrapper) as session:
            opened = session.opened
        (binary,) = wrapper.parent.glob('*.bin')
        view, digest = read_view(dump, half=precision == 'fp16'), file_sha256(binary)
        size_mb = binary.stat().st_size / 1e6
    return OptionRow(
        graph=path.stem,
        variant=variant,
        binary_mb=size_mb,
        binary_sha256=digest,
        compile_s=opened.seconds,
        peak_gb=opened.peak_gb,
        operations=view.summary()['operations'],
        moved_mb=view.moved_mb,
        estimate=estimate(view),
        same_as_none=None if plain is None else digest == plain,
    )


def table_line(row: OptionRow) -> str:
    """Return the table line of a row."""
    same = {None: '-', True: 'yes', False: 'no'}[row.same_as_none]
    cells = [row.graph, row.variant, f'{row.binary_mb:.3f}', same, f'{row.compile_s:.1f}', f'{row.peak_gb:.2f}']
    cells += [str(row.operations), f'{row.moved_mb:.2f}', str(row.estimate)]
    return f'| {" | ".join(cells)} |'


def write_table(folder: pathlib.Path, rows: Sequence[OptionRow], target: Target) -> None:
    """Write options.md and options.json."""
    lines = [
        f'# Compiler options for {target.chipset}',
        '',
        'Counts are those of the graph before finalization, so that finalization modes do not change the estimate.',
        '',
        HEADER,
        *map(table_line, rows),
        '',
        *(f'* `{name}`: {options or "the defaults of the provider"}' for name, options in VARIANTS.items()),
        '',
    ]
    with atomic_file(folder / 'options.md') as path:
        path.write_text('\n'.join(lines))
    with atomic_file(folder / 'options.json') as path:
        path.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + '\n')
