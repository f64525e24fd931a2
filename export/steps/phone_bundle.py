"""The last step of an export: the bundle for a phone, in OUT/bundle/."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any

from export.bundle.contents import BinaryFiles, GraphFiles
from export.bundle.writer import Model, name_of, write_bundle
from export.graphs.runners import Call
from export.host.calibration_set import CalibrationSet
from export.host.file_records import record_of
from export.host.phone_program import PhoneProgram, available
from export.qnn.compile import Target, provider_options, tool_versions
from export.report.rows import VideoRow
from export.steps.code_identity import made_by
from export.steps.graph import ExportedGraph
from export.steps.options import ExportOptions
from export.steps.shared_binary import BINARY
from export.steps.step_cache import finished
from neodragon_jax.base import json_file
from neodragon_jax.base.atomic import atomic_file
from neodragon_jax.generation import defaults as generation
from neodragon_jax.generation.safety import has_checker

FOLDER, RECORD = 'bundle', 'bundle-source.json'
# Files of a bundle that its manifest does not list.
_UNLISTED = ('manifest.json', 'manifest.json.sha256')
# Packages that the bundle's tokenizers are read and written with.
_TOKENIZER_PACKAGES = ('tokenizers', 'transformers')


def is_complete(program: PhoneProgram) -> bool:
    """Return whether all graphs of a video are exported, which a bundle requires."""
    return set(available(program.options)) <= set(program.names)


def write(
    program: PhoneProgram,
    exported: Sequence[ExportedGraph],
    options: ExportOptions,
    calibration: CalibrationSet,
    made: VideoRow | None,
) -> None:
    """Write OUT/bundle/ from finished graphs, each in its first precision, unless the bundle is finished.

    Args:
      made: evaluation videos made with the exported graphs on the CPU; None if none were made.
    """
    out = options.graphs.out
    model = _model(program, options, calibration, made)
    source = _source(exported, options, model)
    if finished(out / FOLDER, source, out / RECORD) is not None:
        return
    graphs = {graph.name: _graph_files(graph, options) for graph in exported}
    write_bundle(
        out / FOLDER,
        model,
        graphs,
        {graph.name: _last_call(graph) for graph in exported},
        _binaries(exported, options),
        {target.chipset: _numbers(target) for target in options.graphs.targets},
        tool_versions(),
    )
    files = json_file.read_json(out / FOLDER / 'manifest.json', dict[str, Any])['files']
    files |= {name: record_of(out / FOLDER / name) for name in _UNLISTED}
    with atomic_file(out / RECORD) as draft:
        draft.write_text(json.dumps({'source': source, 'files': files}, indent=1) + '\n')


def _source(exported: Sequence[ExportedGraph], options: ExportOptions, model: Model) -> dict[str, Any]:
    """Return everything that determines the bundle."""
    first = {graph.name: _precision(graph, options) for graph in exported}
    return {
        'graphs': {graph.name: graph.details[first[graph.name]]['files'] for graph in exported},
        'binaries': {
            f'{graph.name} {target.chipset}': graph.metadata[first[graph.name], target.chipset]['model_files']
            for graph in exported
            for target in options.graphs.targets
        },
        'evaluation_samples': options.graphs.evaluation_samples,  # the last is the recorded call
        'model': _identity(model),
        'package_versions': {name: importlib.metadata.version(name) for name in _TOKENIZER_PACKAGES},
        'safety_checker': has_checker(options.program.root),
        **made_by(__name__),
    }


def _identity(model: Model) -> dict[str, Any]:
    """Return what the tables, the text and the vectors of the bundle depend on, without the paths of folders."""
    options = model.options
    return {
        'name': name_of(options.root),
        'program': [options.mode, dataclasses.asdict(options.plan), options.first_frame, options.images],
        'text_tokens': options.text_tokens,
        'defaults': dataclasses.asdict(model.defaults),
        'weights_sha256': dict(model.weights),
        'calibration': dict(model.protocol),
        'video_db': model.video_db and round(model.video_db, 2),
    }


def _model(program: PhoneProgram, options: ExportOptions, calibration: CalibrationSet, made: VideoRow | None) -> Model:
    """Return the system in the bundle."""
    scenes = calibration.protocol.evaluation
    return Model(
        options=options.program,
        denoiser=program.denoiser.host(lambda feeds: {}),
        scenes=scenes,
        video=calibration.video(0),
        video_db=None if made is None else made.last_db[scenes.prompts[0]],
        defaults=generation.read(options.program.root),
        weights=program.weights,
        protocol={
            'sha256': calibration.sha256,
            'videos': calibration.protocol.videos,
            'prompts': list(calibration.protocol.scenes.prompts),
            'validation_prompts': list(calibration.protocol.validation.prompts),
            'evaluation_prompts': list(scenes.prompts),
        },
    )


def _precision(graph: ExportedGraph, options: ExportOptions) -> str:
    """Return the precision of a graph in the bundle."""
    return options.graphs.precisions_of(graph.name)[0]


def _graph_files(graph: ExportedGraph, options: ExportOptions) -> GraphFiles:
    """Return the files of a graph, with the tensor specifications that its compilation recorded."""
    precision = _precision(graph, options)
    metadata = graph.metadata[precision, options.graphs.targets[0].chipset]
    return GraphFiles(
        precision=precision,
        onnx=graph.precise[precision],
        specs=metadata['graphs'][graph.name] if 'graphs' in metadata else metadata,
        compared=tuple(graph.recorded.compared),
        target_db=graph.recorded.spec.target_db,
    )


def _last_call(graph: ExportedGraph) -> Call:
    """Return the last evaluation call of the first prompt, which has the longest history."""
    return next(iter(graph.recorded.evaluation().values()))[-1]


def _binaries(exported: Sequence[ExportedGraph], options: ExportOptions) -> list[BinaryFiles]:
    """Return the context binaries of every chipset; graphs that share a binary are grouped."""
    shared = options.graphs.shared([graph.name for graph in exported])
    groups: dict[str, list[ExportedGraph]] = {}
    for graph in exported:
        groups.setdefault(BINARY if graph.name in shared else graph.name, []).append(graph)
    binaries = []
    for target in options.graphs.targets:
        for name, graphs in groups.items():
            precision = _precision(graphs[0], options)
            wrappers = {graph.name: graph.wrappers[precision, target.chipset] for graph in graphs}
            given = provider_options(target, precision)
            binaries.append(BinaryFiles(name, precision, target.chipset, wrappers, given))
    return binaries


def _numbers(target: Target) -> dict[str, Any]:
    """Return the fields of a chipset except its name."""
    return {name: value for name, value in dataclasses.asdict(target).items() if name != 'chipset'}
