"""One stage of the denoiser in several forms, each quantized, compiled and counted: what a form costs before any phone.

Forms are the same function, see denoiser.py. Weights are random, as the counts do not depend on them. A graph of one
block (the last, with the embedding and the head) and one of two blocks are built; their difference is one block, and
the figures of the whole model are the first graph plus as many differences: exact, because all those blocks are alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from neodragon_jax.base.errors import InputError, did_you_mean, exit_status

if TYPE_CHECKING:
    import tqdm

    from export.graphs.denoiser import Form
    from export.graphs.table import Feeds
    from export.host.denoiser_host import DenoiserHost
    from export.qnn.compile import Target
    from export.qnn.latency import Estimate
    from export.qnn.static_view import StaticView
    from neodragon_jax.config.neodragon import MMDiTConfig

BASELINE = 'straightforward'
# What the shipped form has to save of the straightforward one's bytes and weights, and its latency (stage 2).
LESS_BYTES, LESS_WEIGHTS, LATENCY_MS = 0.35, 0.30, 850.0

EXAMPLES = """
examples:
  stage 2 of the full-size denoiser in all forms, for Snapdragon 8 Elite:
    python -m export.compare_stage --out out/stage2

  two forms for 8 Gen 3:
    python -m export.compare_stage --forms masked,prefix_folded_matrices --soc sm8650 --out out/stage2

exit status: 0 the shipped form saves what it has to, 1 it does not, 2 wrong input
"""


@dataclasses.dataclass(frozen=True)
class Size:
    """What a stage's graph is made for: history frames, patches (rows, columns) of a latent frame, text tokens."""

    stages: int = 3
    units: int = 6
    grid: tuple[int, int] = (20, 32)
    text_tokens: int = 128


RELEASED = Size()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One built graph."""

    view: StaticView
    quantized_db: float
    quantize_s: float
    compile_s: float
    compile_gb: float


@dataclasses.dataclass(frozen=True)
class FormRow:
    """A form of the whole model: extrapolated counts, estimates, and what building its two-block graph took."""

    form: str
    view: StaticView
    estimate: Estimate
    built: Compiled

    @property
    def bytes_mb(self) -> float:
        """What one call moves: what operations write, and the weights that they read."""
        return self.view.moved_mb + self.view.weights_mb


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        'python -m export.compare_stage',
        description='Build a stage of the denoiser in several forms and count operations, bytes and weights.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--out', required=True, metavar='DIR', help='folder for compare.md and compare.json')
    add('--stage', type=int, default=2, choices=range(RELEASED.stages), help='default: %(default)s')
    add('--soc', default='sm8750', metavar='NAME', help='chipset (default: %(default)s)')
    add('--forms', metavar='LIST', help='comma-separated (default: all)')
    add('--blocks', type=int, default=18, metavar='N', help='of the whole model (default: %(default)s)')
    add('--heads', type=int, default=24, metavar='N',
        help='of 64 dimensions; fewer for a quick try (default: %(default)s)')  # fmt: skip
    add('--first-frame-given', action='store_true',
        help='graphs that never draw frame 0: text then has no use for current keys')  # fmt: skip
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[FormRow]:
    """Build, count and report all forms."""
    import tqdm

    from export.qnn.compile import find_target
    from neodragon_jax.config.neodragon import FULL

    names, target = read_forms(args.forms), find_target(args.soc)
    if args.blocks < 2 or args.heads < 1:
        raise InputError(f'--blocks {args.blocks} --heads {args.heads}: give at least two blocks and one head.')
    config = dataclasses.replace(FULL.denoiser, num_attention_heads=args.heads)
    bar = tqdm.tqdm(total=2 * len(names), unit='graph', disable=not sys.stderr.isatty())
    forms = {name: dataclasses.replace(_form(name), draws_frame_zero=not args.first_frame_given) for name in names}
    rows = []
    for row in compare(config, forms, args.stage, target, args.blocks, RELEASED, lambda text: _advance(bar, text)):
        rows.append(row)
        if bar.disable:
            print(table_line(row), flush=True)
    bar.close()
    write(pathlib.Path(args.out), rows, vars(args))
    return rows


def _advance(bar: tqdm.tqdm[Any], text: str) -> None:
    bar.set_description(text)
    bar.update()


def compare(
    config: MMDiTConfig,
    forms: Mapping[str, Form],
    stage: int,
    target: Target,
    blocks: int,
    size: Size,
    on_graph: Callable[[str], object],
) -> Iterator[FormRow]:
    """Yield a row per form of a model of so many blocks.

    Args:
      config: of the model; its own number of blocks is not used.
      on_graph: called with the name of each built graph.
    """
    for name, form in forms.items():

        def built(count: int, name: str = name, form: Form = form) -> Compiled:
            compiled = build(dataclasses.replace(config, num_layers=count), form, stage, target, size)
            on_graph(f'{name}, {count} blocks')
            return compiled

        yield form_row(name, built, blocks)


def read_forms(text: str | None) -> list[str]:
    """Return the forms of a comma-separated list, or all."""
    from export.graphs.denoiser import FORMS

    names = list(FORMS) if text is None else [name.strip() for name in text.split(',') if name.strip()]
    for name in names:
        if name not in FORMS:
            raise InputError(f'--forms has {name!r}.{did_you_mean(name, FORMS)} Use some of {", ".join(FORMS)}.')
    if not names:
        raise InputError(f'--forms is empty; use some of {", ".join(FORMS)}.')
    return names


def _form(name: str) -> Form:
    from export.graphs.denoiser import FORMS

    return FORMS[name]


def form_row(name: str, built: Callable[[int], Compiled], blocks: int) -> FormRow:
    """Return the row of a form from its graphs of one and of two blocks."""
    from export.qnn.latency import estimate
    from export.qnn.static_view import extrapolate

    short, long = built(1), built(2)
    view = extrapolate(short.view, long.view, blocks - 1)
    return FormRow(name, view, estimate(view), long)


def build(config: MMDiTConfig, form: Form, stage: int, target: Target, size: Size) -> Compiled:
    """Quantize a stage of a model with random weights on one random call, compile it, and count."""
    from export.graphs.denoiser import denoiser_graphs
    from export.graphs.runners import OnnxSession
    from export.host.denoiser_host import DenoiserHost
    from export.measure.snr import snr_db
    from export.qnn.compile import provider_options
    from export.qnn.htp import HtpSession
    from export.qnn.static_view import dump_options, read_view
    from export.quantize.qdq import to_w8a16
    from export.quantize.stitch import export_chain, quantize_chain
    from neodragon_jax.models.mmdit import PyramidMMDiT
    from neodragon_jax.random_checkpoint import random_params

    model, params = PyramidMMDiT(config), random_params('PyramidMMDiT', config, seed=0)
    graph = denoiser_graphs(model, params, size.units, size.grid, size.text_tokens, size.stages, form)[stage]
    host = DenoiserHost(model, params, form)
    call = random_call(host, config, stage, size)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        export_chain(graph, folder / 'float.onnx')
        want = OnnxSession(folder / 'float.onnx').run(call)['flow']
        (folder / 'float.onnx.data').unlink()
        start = time.monotonic()
        quantize_chain(graph, folder / 'quantized.onnx', [call], to_w8a16)
        quantize_s = time.monotonic() - start
        got = OnnxSession(folder / 'quantized.onnx').run(call)['flow']
        (folder / 'dump').mkdir()
        options = provider_options(target, 'w8a16') | dump_options(folder / 'dump')
        with HtpSession(folder / 'quantized.onnx', options) as session:
            opened = session.opened
        view = read_view(folder / 'dump')
    return Compiled(view, snr_db(want, got), quantize_s, opened.seconds, opened.peak_gb)


def random_call(host: DenoiserHost, config: MMDiTConfig, stage: int, size: Size) -> Feeds:
    """Return the inputs of a stage's graph for a random call at the last unit."""
    import jax.numpy as jnp
    import numpy as np

    from neodragon_jax.pyramid.sampler import Prompt
    from neodragon_jax.pyramid.stages import envelope_history, levels

    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    rows, columns = (side * config.patch_size for side in size.grid)
    pyramid = levels(draw(1, size.units + 1, rows, columns, config.in_channels), size.stages)
    unit = jnp.array([size.units])
    mask = (jnp.arange(size.text_tokens) < size.text_tokens // 2)[None].astype(jnp.int32)
    prompt = Prompt(draw(1, size.text_tokens, config.width), mask, draw(1, config.pooled_projection_dim))
    history = envelope_history(pyramid, unit, stage, size.units)
    return host.stage_inputs(history, pyramid[stage][:, -1:], unit, prompt, jnp.array([700.0]))


def verdict(rows: Sequence[FormRow], stage: int) -> list[str]:
    """Return one line per promise of the shipped form against the straightforward one; 'MISSED' in those not kept."""
    by_name = {row.form: row for row in rows}
    if BASELINE not in by_name or rows[-1].form == BASELINE:
        return []
    best = rows[-1]
    saved = savings(by_name[BASELINE], best)
    checks = [('bytes moved', saved['bytes moved'], LESS_BYTES), ('weights', saved['weights'], LESS_WEIGHTS)]
    lines = [
        f'{best.form} against {BASELINE}: {what} {share:.1%} less, promised {least:.0%}' + ' MISSED' * (share < least)
        for what, share, least in checks
    ]
    if stage == RELEASED.stages - 1:
        worst = best.estimate.worst_ms
        line = f'{best.form}: estimated latency {worst:.0f} ms by the worse model, promised {LATENCY_MS:.0f} ms'
        lines.append(line + ' MISSED' * (worst > LATENCY_MS))
    return lines


def savings(base: FormRow, best: FormRow) -> dict[str, float]:
    """Return which share of its bytes and weights a form saves."""
    return {
        'bytes moved': 1 - best.bytes_mb / base.bytes_mb,
        'weights': 1 - best.view.weights_mb / base.view.weights_mb,
    }


HEADER = (
    '| form | ops | moved MB | scores MB | transposes | weights MB | estimated ms, flat / by operation | QDQ dB | '
    'quantize s | compile s | peak GB |\n|---|---|---|---|---|---|---|---|---|---|---|'
)


def table_line(row: FormRow) -> str:
    """Return a form's line of the table."""
    counts, built = row.view.summary(), row.built
    cells = [
        row.form,
        counts['operations'],
        f'{counts["moved_mb"]:.0f}',
        f'{counts["score_mb"]:.0f}',
        f'{counts["transposes"]} / {counts["transposed_mb"]:.0f} MB',
        f'{counts["weights_mb"]:.0f}',
        f'{row.estimate.flat_ms:.0f} / {row.estimate.by_operation_ms:.0f}',
        f'{built.quantized_db:.1f}',
        f'{built.quantize_s:.0f}',
        f'{built.compile_s:.0f}',
        f'{built.compile_gb:.1f}',
    ]
    return f'| {" | ".join(map(str, cells))} |'


def write(folder: pathlib.Path, rows: Sequence[FormRow], settings: dict[str, Any]) -> None:
    """Write compare.md and compare.json."""
    from neodragon_jax.base.atomic import atomic_file

    lines = [
        f'# Stage {settings["stage"]} of the denoiser, {settings["blocks"]} blocks, {settings["soc"]}',
        '',
        'Counted from the graphs that QNN compiled; latencies are estimates for Snapdragon 8 Elite, see '
        'export/cost.py. Counts and estimates are those of the whole model, extrapolated from graphs of one and of two '
        'blocks; ratio, times and memory are those of the two blocks. Random weights, calibrated on the one random '
        'call that the ratio is measured on: it shows the error of rounding alone.',
        '',
        HEADER,
        *map(table_line, rows),
        '',
        *(f'* {line}' for line in verdict(rows, settings['stage'])),
        '',
    ]
    values = [
        {
            'form': row.form,
            **row.view.summary(),
            **dataclasses.asdict(row.estimate),
            'operations_by_kind': {kind: round(count) for kind, count in sorted(row.view.operations.items())},
            'moved_mb_by_kind': {kind: round(size, 2) for kind, size in sorted(row.view.output_mb.items())},
            **{key: value for key, value in dataclasses.asdict(row.built).items() if key != 'view'},
        }
        for row in rows
    ]
    with atomic_file(folder / 'compare.json') as path:
        path.write_text(json.dumps({'settings': settings, 'forms': values}, indent=2) + '\n')
    with atomic_file(folder / 'compare.md') as path:
        path.write_text('\n'.join(lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    args = parse_args(argv)
    rows: list[FormRow] = []
    status = exit_status(lambda: rows.extend(run(args)))
    if status:
        return status
    print(pathlib.Path(args.out) / 'compare.md')
    lines = verdict(rows, args.stage)
    print('\n'.join(lines))
    return int(any('MISSED' in line for line in lines))


if __name__ == '__main__':
    sys.exit(main())
