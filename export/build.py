"""One graph from JAX to a measured context binary, each step in a folder of its own.

Folders are named {graph}-{runtime}-{precision}-{chipset} and hold metadata.json. A folder that was made from the same
checkpoint, settings and code is kept, so that an interrupted export of the full-size model resumes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import neodragon_jax
from export.calibration import Sample
from export.compile_qnn import Target, compile_graph, provider_options, tool_versions
from export.graphs import DenoiserHost, Feeds, Graph
from export.htp import HtpSession
from export.quantize import to_fp16, to_w8a16
from export.report import Row, snr_db
from export.runtime import GraphRunner, OnnxSession
from export.to_onnx import to_onnx
from neodragon_jax.atomic import atomic_folder
from neodragon_jax.errors import InputError

# The float graph is the same arithmetic in another order; anything below this is a wrong export.
EXPORT_DB = 90.0


@dataclasses.dataclass(frozen=True)
class Exported:
    """The artefacts of one graph.

    Attributes:
      onnx: float graph.
      operations: nodes in it.
      precise: ONNX file at each precision.
      metadata: of the context binary at each precision.
      wrappers: context binary at each precision, as an ONNX file that wraps it.
    """

    graph: Graph
    onnx: pathlib.Path
    operations: int
    precise: dict[str, pathlib.Path]
    metadata: dict[str, dict[str, Any]]
    wrappers: dict[str, pathlib.Path]


def fingerprint(folder: pathlib.Path, calibration: Mapping[int, Sequence[Sample]], **settings: Any) -> dict[str, Any]:
    """Return what artefacts are made from: weights, calibration inputs, code, tools, and whatever else is given.

    Args:
      folder: of the denoiser.
      calibration: recorded calls of every stage.
    """
    weights, inputs, code = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for path in sorted(folder.glob('*.safetensors')):
        with path.open('rb') as file:
            weights.update(hashlib.file_digest(file, 'sha256').digest())
    for leaf in jax.tree.leaves(dict(calibration)):
        inputs.update(np.ascontiguousarray(leaf).data)
    for package in (pathlib.Path(__file__).parent, pathlib.Path(neodragon_jax.__file__).parent):
        for path in sorted(package.rglob('*.py')):
            code.update(path.read_bytes())
    return {
        'checkpoint': folder.name,
        'checkpoint_sha256': weights.hexdigest(),
        'calibration_sha256': inputs.hexdigest(),
        'code_sha256': code.hexdigest(),
        'tool_versions': tool_versions(),
        **settings,
    }


def export_graph(
    graph: Graph,
    out: pathlib.Path,
    target: Target,
    precisions: Sequence[str],
    feeds: Callable[[], Iterable[Feeds]],
    source: dict[str, Any],
    on_step: Callable[[str], None],
) -> Exported:
    """Export, quantise and compile a graph.

    Args:
      out: parent of all folders.
      feeds: returns the calibration inputs.
      source: see `fingerprint`.
      on_step: called with the name of each finished step.
    Raises:
      InputError: the graph cannot be exported or compiled.
    """
    name = graph.name

    def write_float(draft: pathlib.Path) -> dict[str, Any]:
        return {'operations': dict(to_onnx(graph, draft / f'{name}.onnx'))}

    folder = out / f'{name}-onnx-float'
    operations = sum(_kept_or_made(folder, source, write_float)['operations'].values())
    float_onnx = folder / f'{name}.onnx'
    on_step(f'{name}: ONNX, {operations} operations')

    precise, metadata, wrappers = {}, {}, {}
    for precision in precisions:

        def write_precise(draft: pathlib.Path, precision: str = precision) -> dict[str, Any]:
            if precision == 'fp16':
                to_fp16(float_onnx, draft / f'{name}.onnx')
            else:
                to_w8a16(float_onnx, draft / f'{name}.onnx', feeds())
            return {'precision': precision}

        folder = out / f'{name}-onnx-{precision}'
        _kept_or_made(folder, source, write_precise)
        precise[precision] = folder / f'{name}.onnx'
        on_step(f'{name}: {precision}')

        folder = out / f'{name}-qnn-{precision}-{target.chipset}'
        metadata[precision] = _kept(folder, source) or compile_graph(
            name, precise[precision], folder, target, precision, source
        )
        wrappers[precision] = folder / f'{name}.onnx'
        on_step(f'{name}: {precision} for {target.chipset}, {metadata[precision]["compile"]["seconds"]} s')
    return Exported(graph, float_onnx, operations, precise, metadata, wrappers)


def measure(
    exported: Exported,
    host: DenoiserHost,
    samples: Sequence[Sample],
    target: Target,
    simulate: bool,
    on_step: Callable[[str], None],
) -> Iterator[Row]:
    """Yield one row of the report per precision.

    Args:
      samples: calls with their reference flows, none of them used for calibration.
      simulate: whether to run the context binaries on the HTP simulator.
    Raises:
      InputError: the float graph does not compute what JAX computes.
    """
    name, deployment = exported.graph.name, exported.graph.deployment
    onnx_db = _lowest_db(OnnxSession(exported.onnx), host, samples)
    if onnx_db < EXPORT_DB:
        raise InputError(
            f'{name}: the float ONNX graph is only {onnx_db:.1f} dB from JAX, not {EXPORT_DB:.0f}. '
            'Check the pinned versions of jax2onnx and onnxruntime.'
        )
    on_step(f'{name}: ONNX {onnx_db:.1f} dB')
    for precision, metadata in exported.metadata.items():
        quantised_db = htp_db = None
        if precision == 'w8a16':
            quantised_db = _lowest_db(OnnxSession(exported.precise[precision]), host, samples)
        if simulate:
            with HtpSession(exported.wrappers[precision], provider_options(target, precision)) as session:
                htp_db = _lowest_db(session, host, samples)
        sizes = {file: entry['bytes'] for file, entry in metadata['model_files'].items()}
        row = Row(
            graph=name,
            precision=precision,
            ships=precision == deployment.precision,
            operations=exported.operations,
            target_db=deployment.target_db,
            onnx_db=onnx_db,
            quantised_db=quantised_db,
            htp_db=htp_db,
            binary_mb=sum(size for file, size in sizes.items() if file.endswith('.bin')) / 1e6,
            compile_s=metadata['compile']['seconds'],
            peak_gb=metadata['compile']['peak_gb'],
        )
        on_step(f'{name}: {precision} {"not measured" if row.deploy_db is None else f"{row.deploy_db:.1f} dB"}')
        yield row


def graph_feeds(host: DenoiserHost, samples: Iterable[Sample]) -> Iterator[Feeds]:
    """Yield the inputs of a stage's graph for recorded calls."""
    for sample in samples:
        yield host.stage_inputs(*sample[:-1])


def _lowest_db(runner: GraphRunner, host: DenoiserHost, samples: Sequence[Sample]) -> float:
    """Return the lowest ratio of a graph over recorded calls."""
    ratios = []
    for sample, feeds in zip(samples, graph_feeds(host, samples), strict=True):
        got = runner.run(feeds)['flow']
        ratios.append(snr_db(host.patches(sample.flow), got))
    return float(np.min(ratios))


def _kept(folder: pathlib.Path, source: dict[str, Any]) -> dict[str, Any] | None:
    """Return the metadata of a folder that was made from the same things, or None."""
    path = folder / 'metadata.json'
    if not path.is_file():
        return None
    metadata = json.loads(path.read_text())
    return metadata if metadata.get('source') == source else None


def _kept_or_made(
    folder: pathlib.Path, source: dict[str, Any], write: Callable[[pathlib.Path], dict[str, Any]]
) -> dict[str, Any]:
    """Return the metadata of a folder, making it with `write` unless it is there."""
    metadata = _kept(folder, source)
    if metadata is None:
        with atomic_folder(folder, replace=True) as draft:
            metadata = write(draft) | {'source': source}
            (draft / 'metadata.json').write_text(json.dumps(metadata, indent=2) + '\n')
    return metadata
