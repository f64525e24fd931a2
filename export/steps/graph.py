"""One graph from JAX to measured context binaries, each step in a folder of its own.

Folders are named {graph}-{runtime}-{precision}-{chipset} and hold metadata.json, which says what they were made from:
the hashes of the weights and of the files of the step before, the settings, the code, the tools. A step whose folder
says the same is skipped, so that an interrupted export of the full-size model resumes, and a change costs only what
depends on it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import neodragon_jax
from export.graphs.denoiser import ChainedGraph
from export.graphs.runners import Call, OnnxSession
from export.graphs.table import DEPLOYMENTS, Deployment, Feeds, Graph
from export.graphs.to_onnx import to_onnx
from export.measure.resources import Resources, inner_bar, measured
from export.measure.snr import lowest_db
from export.qnn.compile import Target, binary_mb, compile_graph, provider_options, tool_versions
from export.qnn.htp import HtpSession
from export.quantize.adaround import GRAPHS as ADAROUND_GRAPHS
from export.quantize.adaround import AdaRound, round_weights
from export.quantize.qdq import quantize, quantized_operations, to_fp16, to_w8a16
from export.quantize.ranges import measure_ranges
from export.quantize.stitch import export_chain, quantize_chain
from export.quantize.two_parts import quantize_to_target
from export.report.report import Row
from neodragon_jax.base.atomic import atomic_folder
from neodragon_jax.base.errors import InputError

# The float graph is the same arithmetic in another order; anything below this is a wrong export. Most graphs are above
# 100 dB, but ONNX Runtime sums the ten million values under a norm of a 640x1024 picture in float32: 84 dB.
EXPORT_DB = 80.0

OnStep = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Task:
    """A graph to export, and the recorded calls around it. Nothing is read before it is needed.

    Attributes:
      name: its row in the table.
      judged: names of the outputs that the graph is judged by.
      make: returns the graph.
      made_from: hashes and sizes that decide what `make` returns.
      calibration: returns the inputs that ranges are measured on, read one by one.
      judging: returns a few calibration calls with their outputs in JAX, to choose settings by.
      evaluation: returns calls that calibration did not see.
    """

    name: str
    judged: Sequence[str]
    make: Callable[[], Graph]
    made_from: dict[str, Any]
    calibration: Callable[[], Iterator[Feeds]]
    judging: Callable[[], Sequence[Call]]
    evaluation: Callable[[], Sequence[Call]]

    @property
    def deployment(self) -> Deployment:
        """The graph's row in the table."""
        return DEPLOYMENTS[self.name]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How graphs are exported.

    Attributes:
      out: parent of all folders.
      targets: chipsets; the simulator runs the binaries of the first.
      precisions: None takes each graph's own.
      ranges: rules for the ranges of activations, of `ranges.METHODS`; the best of several is taken.
      adaround: for `adaround.GRAPHS`; None rounds all weights to the nearest.
      two_parts: whether weights take two parts of 8 bits where a target needs it.
      calibration_sha256: hash of the calibration set.
      calibration_samples: calls of it that ranges are measured on, by graph.
      evaluation_samples: calls per graph that binaries are judged by.
      simulate: whether to run binaries on the HTP simulator.
      shared: graphs to be compiled into one binary (see shared.py), not each into its own.
      compare: whether to also do what is only for comparison: those graphs' own binaries, a straightforward export.
    """

    out: pathlib.Path
    targets: Sequence[Target]
    precisions: Sequence[str] | None
    ranges: Sequence[str]
    adaround: AdaRound | None
    two_parts: bool
    calibration_sha256: str
    calibration_samples: dict[str, int]
    evaluation_samples: int
    simulate: bool
    shared: Sequence[str]
    compare: bool

    def adaround_of(self, name: str) -> AdaRound | None:
        """Return how the rounding of a graph's weights is learned, if it is."""
        return self.adaround if name in ADAROUND_GRAPHS else None

    def precisions_of(self, name: str) -> Sequence[str]:
        """Return the precisions that a graph is exported in."""
        return self.precisions or (DEPLOYMENTS[name].precision,)


@dataclasses.dataclass(frozen=True)
class Exported:
    """The artifacts of one graph.

    Attributes:
      onnx: float graph.
      operations: number of its operations by kind.
      spent: seconds and peak memory of making it.
      precise: ONNX file at each precision.
      details: what the metadata of each says about how it was quantized.
      metadata, wrappers: of the context binary, and the ONNX file that wraps it, at each (precision, chipset).
    """

    task: Task
    onnx: pathlib.Path
    operations: dict[str, int]
    spent: Resources
    precise: dict[str, pathlib.Path]
    details: dict[str, dict[str, Any]]
    metadata: dict[tuple[str, str], dict[str, Any]]
    wrappers: dict[tuple[str, str], pathlib.Path]


@functools.cache
def makers() -> dict[str, Any]:
    """Return what makes artifacts besides their inputs: this code and the tools, by hash and version."""
    code = hashlib.sha256()
    for package in (pathlib.Path(__file__).parents[1], pathlib.Path(neodragon_jax.__file__).parent):
        for path in sorted(package.rglob('*.py')):
            code.update(path.read_bytes())
    return {'code_sha256': code.hexdigest(), 'tool_versions': tool_versions()}


def steps_of(name: str, settings: Settings) -> int:
    """Return how many steps `export_graph` and `measure` report for a graph."""
    compiled = 0 if name in settings.shared else len(settings.targets)
    return 2 + len(settings.precisions_of(name)) * (2 + compiled)


def export_graph(task: Task, settings: Settings, on_step: OnStep) -> Exported:
    """Export, quantize and compile a graph, unless it shares a binary; skip every step that is done.

    Args:
      on_step: called with the name of each finished step.
    Raises:
      InputError: the graph cannot be exported or compiled.
    """
    name, out = task.name, settings.out

    def write_float(draft: pathlib.Path) -> dict[str, Any]:
        return {'operations': _write_float(task.make(), draft / f'{name}.onnx')}

    folder = out / f'{name}-onnx-float'
    made = kept_or_made(folder, task.made_from | {'graph': name} | makers(), write_float)
    onnx_path, operations = folder / f'{name}.onnx', made['operations']
    on_step(f'{name}: ONNX, {sum(operations.values())} operations')

    exported = Exported(task, onnx_path, operations, made['spent'], {}, {}, {}, {})
    adaround = settings.adaround_of(name)
    for precision in settings.precisions_of(name):
        source = {'float': made['files'], 'precision': precision} | makers()
        if precision == 'w8a16':
            samples = settings.calibration_samples[name]
            source |= {'calibration_sha256': settings.calibration_sha256, 'calibration_samples': samples}
            target_db = task.deployment.target_db if settings.two_parts else None
            source |= {'ranges': list(settings.ranges), 'target_db': target_db}
            if adaround is not None:
                source |= {'adaround': [adaround.version, adaround.iterations]}
        folder = out / f'{name}-onnx-{precision}'
        write = functools.partial(_write_precise, task, onnx_path, precision, settings, adaround)
        details = kept_or_made(folder, source, write)
        exported.precise[precision], exported.details[precision] = folder / f'{name}.onnx', details
        on_step(f'{name}: {precision}{_doubled_note(details)}')
        for target in () if name in settings.shared else settings.targets:
            key = (precision, target.chipset)
            exported.metadata[key], exported.wrappers[key] = compile_alone(exported, precision, target, out)
            on_step(f'{name}: {precision} for {target.chipset}, {exported.metadata[key]["compile"]["seconds"]} s')
    return exported


def _write_float(graph: Graph, path: pathlib.Path) -> dict[str, int]:
    """Write a float graph; return its operations by kind."""
    if isinstance(graph, ChainedGraph):
        with inner_bar(f'{graph.name}, pieces', len(graph.pieces)) as on_piece:
            return {'all': export_chain(graph, path, on_piece)}
    return dict(to_onnx(graph, path))


def _write_precise(
    task: Task,
    source: pathlib.Path,
    precision: str,
    settings: Settings,
    adaround: AdaRound | None,
    draft: pathlib.Path,
) -> dict[str, Any]:
    """Write a graph at a precision; return what metadata is to say about it."""
    path = draft / f'{task.name}.onnx'
    if precision == 'fp16':
        to_fp16(source, path)
        return {'precision': precision}
    chain = task.make() if task.name.startswith('denoiser') else None
    if isinstance(chain, ChainedGraph):
        with inner_bar(f'{chain.name}, pieces', len(chain.pieces)) as on_piece:
            quantize_chain(chain, path, task.calibration(), to_w8a16, on_piece)
        return {'precision': precision, 'ranges': 'minmax'}
    return {'precision': precision} | _quantize(task, source, path, settings, adaround)


def _quantize(
    task: Task, source: pathlib.Path, path: pathlib.Path, settings: Settings, adaround: AdaRound | None
) -> dict[str, Any]:
    """Write the W8A16 form with the best ranges and as few weights in two parts as the target needs."""
    judging, judged, methods = task.judging(), task.judged, settings.ranges
    reached = {}
    for method in methods:
        ranges = path.with_name(f'ranges-{method}.json')
        measure_ranges(source, ranges, task.calibration, quantized_operations(source), method)
        if len(methods) > 1:
            quantize(source, path, ranges)
            reached[method] = lowest_db(OnnxSession(path), judging, judged)
    best = max(methods, key=lambda method: reached.get(method, 0))
    ranges = path.with_name(f'ranges-{best}.json')
    rounding, rounding_db = None, {}
    if adaround is not None:
        learned = round_weights(adaround, source, task.calibration())
        for name, candidate in (('nearest', None), ('adaround', learned)):
            quantize(source, path, ranges, candidate)
            rounding_db[name] = lowest_db(OnnxSession(path), judging, judged)
        rounding = learned if rounding_db['adaround'] > rounding_db['nearest'] else None
    target_db = task.deployment.target_db
    doubled, judged_db = quantize_to_target(
        source, path, ranges, judging, judged, target_db, rounding, settings.two_parts
    )
    details = {'ranges': best, 'ranges_db': reached, 'rounding_db': rounding_db}
    return details | {'doubled_weights': doubled, 'judged_db': judged_db}


def _doubled_note(details: dict[str, Any]) -> str:
    count = len(details.get('doubled_weights', ()))
    return f', {count} weights in two parts' if count else ''


def compile_alone(
    exported: Exported, precision: str, target: Target, out: pathlib.Path
) -> tuple[dict[str, Any], pathlib.Path]:
    """Compile a graph for a chipset into a binary of its own, unless that is done; return metadata and wrapper.

    Raises:
      InputError: the graph does not compile.
    """
    name = exported.task.name
    folder = out / f'{name}-qnn-{precision}-{target.chipset}'
    files = exported.details[precision]['files']
    source = {'model': files, 'options': provider_options(target, precision)} | makers()
    metadata = kept(folder, source)
    if metadata is None:
        metadata = compile_graph(name, exported.precise[precision], folder, target, precision, source)
    return metadata, folder / f'{name}.onnx'


def measure(exported: Exported, settings: Settings, on_step: OnStep) -> Iterator[Row]:
    """Yield one row of the report per precision and chipset.

    Raises:
      InputError: the float graph does not compute what JAX computes.
    """
    task, calls = exported.task, exported.task.evaluation()
    onnx_db = lowest_db(OnnxSession(exported.onnx), calls, task.judged)
    if onnx_db < EXPORT_DB:
        raise InputError(
            f'{task.name}: the float ONNX graph is only {onnx_db:.1f} dB from JAX, not {EXPORT_DB:.0f}. '
            'Check the pinned versions of jax2onnx and onnxruntime.'
        )
    on_step(f'{task.name}: ONNX {onnx_db:.1f} dB')
    for precision, path in exported.precise.items():
        quantized_db = lowest_db(OnnxSession(path), calls, task.judged) if precision == 'w8a16' else None
        for number, target in enumerate(settings.targets):
            first = number == 0
            simulated = _simulate(exported, precision, target, calls) if settings.simulate and first else None
            row = _row(exported, precision, target, onnx_db, quantized_db, simulated)
            if first:
                on_step(f'{task.name}: {precision}, {"not measured" if row.met is None else f"{row.deploy_db:.1f} dB"}')
            yield row


def _simulate(exported: Exported, precision: str, target: Target, calls: Sequence[Call]) -> dict[str, float]:
    """Return the ratio of a binary on the simulator and what running it took; of a shared one, as it was measured."""
    metadata = exported.metadata[precision, target.chipset]
    if metadata.get('shared'):
        return metadata['simulated']
    start = time.monotonic()
    with HtpSession(exported.wrappers[precision, target.chipset], provider_options(target, precision)) as session:
        reached = lowest_db(session, calls, exported.task.judged)
        return {'db': reached, 'seconds': round(time.monotonic() - start, 1), 'peak_gb': round(session.peak_gb(), 2)}


def _row(
    exported: Exported,
    precision: str,
    target: Target,
    onnx_db: float,
    quantized_db: float | None,
    simulated: dict[str, float] | None,
) -> Row:
    """Return a row of the report."""
    task, metadata = exported.task, exported.metadata[precision, target.chipset]
    view, deployment = metadata['static_view'], task.deployment
    return Row(
        graph=task.name,
        precision=precision,
        chipset=target.chipset,
        ships=precision == deployment.precision,
        operations=sum(exported.operations.values()),
        target_db=deployment.target_db,
        onnx_db=onnx_db,
        quantized_db=quantized_db,
        htp_db=None if simulated is None else simulated['db'],
        doubled_weights=len(exported.details[precision].get('doubled_weights', ())),
        ranges_db=exported.details[precision].get('ranges_db', {}),
        rounding_db=exported.details[precision].get('rounding_db', {}),
        qnn_operations=view['operations'],
        moved_mb=view['moved_mb'],
        transposes=view['transposes'],
        transposed_mb=view['transposed_mb'],
        float_operations=sum(view['float_operations'].values()) if precision == 'w8a16' else 0,
        binary_mb=binary_mb(metadata),
        shared=bool(metadata.get('shared')),
        estimated_ms=view['estimated_ms_on_8_elite'],
        spent={
            'float graph': exported.spent,
            'quantize': exported.details[precision]['spent'],
            'compile': metadata['compile'],
            'simulate': simulated,
        },
        paper_ms={'X Elite': deployment.x_elite_ms, '8 Elite': deployment.elite_8_ms},
    )


def kept(folder: pathlib.Path, source: dict[str, Any]) -> dict[str, Any] | None:
    """Return the metadata of a folder that was made from the same things, or None."""
    path = folder / 'metadata.json'
    if not path.is_file():
        return None
    metadata = json.loads(path.read_text())
    return metadata if metadata.get('source') == source else None


def kept_or_made(
    folder: pathlib.Path, source: dict[str, Any], write: Callable[[pathlib.Path], dict[str, Any]]
) -> dict[str, Any]:
    """Return the metadata of a folder, making it with `write` unless it is there; it holds the hashes of its files."""
    metadata = kept(folder, source)
    if metadata is None:
        with atomic_folder(folder, replace=True) as draft:
            with measured() as spent:
                metadata = write(draft)
            metadata |= {'spent': spent, 'source': source}
            metadata['files'] = {path.name: _sha256(path) for path in sorted(draft.iterdir())}
            (draft / 'metadata.json').write_text(json.dumps(metadata, indent=2, default=_plain) + '\n')
    return metadata


def _sha256(path: pathlib.Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _plain(value: Any) -> Any:
    """Return a NumPy number as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f'{type(value).__name__} in metadata')
