"""Writer of a bundle from exported graphs, context binaries and a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from export.bundle.contents import BinaryFiles, Draft, GraphFiles
from export.bundle.first_frame_tables import first_frame_entry
from export.bundle.host_tables import denoiser_entry, normalization_entry, text_entries
from export.bundle.meanings import input_meaning, output_meaning
from export.bundle.memory import memory, phases
from export.bundle.readme import readme
from export.bundle.vectors import write_call, write_video
from export.graphs.runners import Call
from export.host.denoiser_host import DenoiserHost
from export.host.file_records import digest_line
from export.host.graph_program import TextHost
from export.host.modules import ProgramOptions
from export.host.recording import Scenes, Video
from export.rewrite.onnx_graph import external_files
from neodragon_jax.base.atomic import atomic_folder
from neodragon_jax.base.errors import InputError
from neodragon_jax.generation.defaults import SPATIAL_FACTOR, TEMPORAL_FACTOR, GenerationDefaults
from neodragon_jax.generation.safety import has_checker

# Increases when a reader of the version before cannot read a bundle; the players have their own constant.
SCHEMA, VERSION = 'neodragon-bundle', 2
FRAMES_PER_SECOND = 24
# The lowest versions that play a bundle, whatever made it. Plugin: onnxruntime-qnn 2.7.0 names ONNX Runtime 1.24.1 as
# its lowest. Graphs: those of a W8A16 bundle load with 1.24.1 and have their SNR. Older plugins were not tried. QNN's
# SDK is compared by the binary's own `qnn_sdk`; recorded calls judge what a version computes.
MINIMUM_RUNTIME = {'onnxruntime': '1.24.1', 'onnxruntime-qnn': '2.7.0'}
_LICENSE = pathlib.Path(__file__).parents[2] / 'LICENSE'


@dataclasses.dataclass(frozen=True)
class Model:
    """The system in a bundle.

    Attributes:
      options: checkpoint, mode and size of the video.
      denoiser: host part of the denoiser, without modulation.
      scenes: the evaluation prompts.
      video: the recorded video of the first of them, the reference for devices.
      video_db: ratio of its last latent frame when the exported graphs make it; None if it was not measured.
      defaults: generation defaults of the checkpoint.
      weights: SHA-256 of each component's weights.
      protocol: how the calibration set was recorded.
    """

    options: ProgramOptions
    denoiser: DenoiserHost
    scenes: Scenes
    video: Video
    video_db: float | None
    defaults: GenerationDefaults
    weights: Mapping[str, str]
    protocol: Mapping[str, Any]


def write_bundle(
    folder: pathlib.Path,
    model: Model,
    graphs: Mapping[str, GraphFiles],
    calls: Mapping[str, Call],
    binaries: Sequence[BinaryFiles],
    chipsets: Mapping[str, Mapping[str, Any]],
    tools: Mapping[str, str],
) -> None:
    """Write a bundle; an existing folder is replaced. The same inputs give the same bytes.

    Args:
      graphs: all exported graphs that the video needs, by name.
      calls: a recorded call of each graph.
      binaries: context binaries of the graphs.
      chipsets: `soc_model`, `htp_arch` and `product` of each chipset of the binaries.
      tools: versions of the packages that made the graphs and the binaries.
    Raises:
      InputError: a graph of the video is missing.
    """
    with atomic_folder(folder, replace=True) as target:
        draft = Draft(target)
        options, host = model.options, TextHost.load(model.options)
        widths = _widths(graphs, options.text_tokens)
        first_unit = 1 if options.has_model or options.images else 0
        manifest = _identity(model, tools) | {
            'video': _video_entry(model),
            'text': text_entries(draft, host, options.text_tokens),
            'first_frame': first_frame_entry(draft, options) if options.has_model else None,
            'denoiser': denoiser_entry(draft, model.denoiser, options.plan, widths, first_unit),
            'graphs': {name: _graph_entry(draft, name, graph, calls[name]) for name, graph in graphs.items()},
            'vectors': {'video': write_video(draft, model.scenes, model.video, model.video_db)},
            'chipsets': {name: dict(chipset) for name, chipset in chipsets.items()},
            'binaries': [_binary_entry(draft, binary) for binary in binaries],
        }
        manifest['phases'] = phases(manifest, draft.files)
        manifest['memory'] = memory(manifest['phases'])
        draft.copy(_LICENSE, 'LICENSE')
        draft.write(readme(manifest).encode(), 'README.md')
        manifest |= {'tables': draft.tables, 'files': dict(sorted(draft.files.items()))}
        content = (json.dumps(manifest, indent=1, ensure_ascii=False) + '\n').encode()
        (target / 'manifest.json').write_bytes(content)
        (target / 'manifest.json.sha256').write_text(digest_line(target / 'manifest.json'))


def name_of(root: os.PathLike[str] | str) -> str:
    """Return the name of a checkpoint's folder, also of a path such as `.` or `..`."""
    return pathlib.Path(root).resolve().name


def _identity(model: Model, tools: Mapping[str, str]) -> dict[str, Any]:
    """Return the entries that tell one bundle from another."""
    plan = model.options.plan
    schedule = {'steps': list(plan.steps), 'first_steps': list(plan.first_steps), 'spacing': plan.schedule.spacing}
    return {
        'schema': SCHEMA,
        'version': VERSION,
        'name': name_of(model.options.root),
        'checkpoint': {
            'mode': model.options.mode,
            'schedule': schedule,
            'weights_sha256': dict(sorted(model.weights.items())),
            'calibration': dict(model.protocol),
        },
        'tool_versions': dict(tools),
        'minimum_runtime': dict(MINIMUM_RUNTIME),
        'license': _license_notes(),
        'safety': {'checkpoint_has_checker': has_checker(model.options.root)},
    }


def _widths(graphs: Mapping[str, GraphFiles], text_tokens: int) -> dict[str, int]:
    """Return the sizes of an encoded prompt for the denoiser.

    Raises:
      InputError: a graph that every video needs is missing.
    """
    needed = ('clip_l', 'clip_g', 'dt5', 'context_adapter', 'denoiser_modulation', 'denoiser_stage0', 'video_decoder')
    missing = [name for name in needed if name not in graphs]
    if missing:
        raise InputError(f'a bundle needs the graph {missing[0]}, which is not exported; leave --graphs out.')
    text = graphs['denoiser_stage0'].specs['inputs']['text']['shape'][-1]
    pooled = graphs['denoiser_modulation'].specs['inputs']['pooled']['shape'][-1]
    return {'text_tokens': text_tokens, 'text': text, 'pooled': pooled}


def _video_entry(model: Model) -> dict[str, Any]:
    """Return sizes, prompts and normalization of the video."""
    plan, defaults = model.options.plan, model.defaults
    return {
        'frames': 1 + TEMPORAL_FACTOR * (plan.frames - 1),
        'height': plan.height * SPATIAL_FACTOR,
        'width': plan.width * SPATIAL_FACTOR,
        'frames_per_second': FRAMES_PER_SECOND,
        'frames_per_latent': TEMPORAL_FACTOR,
        'latent_frames': plan.frames,
        'latent_height': plan.height,
        'latent_width': plan.width,
        'latent_channels': plan.channels,
        'prompt_modifier': defaults.prompt_modifier,
        'negative_prompt': defaults.negative_prompt,
        'prompts': defaults.prompts,
        'example': defaults.example,
        'normalization': normalization_entry(),
    }


def _graph_entry(draft: Draft, name: str, graph: GraphFiles, call: Call) -> dict[str, Any]:
    """Write a graph and its test vector; return its part of the manifest."""
    folder = f'portable/{name}-onnx-{graph.precision}'
    files = [graph.onnx.name, *external_files(onnx.load(graph.onnx, load_external_data=False).graph)]
    inputs = {
        tensor: dict(zip(('source', 'meaning'), input_meaning(name, tensor), strict=True)) | _tensor_entry(spec)
        for tensor, spec in graph.specs['inputs'].items()
    }
    outputs = {
        tensor: {'meaning': output_meaning(name, tensor)} | _tensor_entry(spec)
        for tensor, spec in graph.specs['outputs'].items()
    }
    return {
        'precision': graph.precision,
        'portable': [draft.link(graph.onnx.parent / file, f'{folder}/{file}') for file in files],
        'inputs': inputs,
        'outputs': outputs,
        'vector': write_call(draft, name, graph, call),
    }


def _tensor_entry(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shape, type and quantization of a tensor: value = scale (q - zero_point)."""
    entry = {'shape': list(spec['shape']), 'dtype': spec['dtype']}
    quantized = spec.get('quantized_inside_to')
    if quantized is None:
        return entry
    low, high = (0, 65535) if quantized['type'].startswith('u') else (-32768, 32767)
    if quantized['type'].endswith('int8'):
        low, high = (0, 255) if quantized['type'].startswith('u') else (-128, 127)
    at = lambda number: quantized['scale'] * (number - quantized['zero_point'])
    return entry | {'quantization': {**quantized, 'range': [at(low), at(high)]}}


def _binary_entry(draft: Draft, binary: BinaryFiles) -> dict[str, Any]:
    """Add a context binary and its wrappers; return their part of the manifest."""
    folder = f'binaries/{binary.name}-qnn-{binary.precision}-{binary.chipset}'
    graphs, files, versions = {}, set(), set()
    for graph, wrapper in binary.wrappers.items():
        (node,) = onnx.load(wrapper, load_external_data=False).graph.node
        values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        files.add(wrapper.with_name(values['ep_cache_context'].decode()))
        versions.add(values['ep_sdk_version'].decode())
        path = draft.link(wrapper, f'{folder}/{wrapper.name}')
        graphs[graph] = {'wrapper': path, 'qnn_graph': values['partition_name'].decode()}
    (file,), (qnn_sdk,) = files, versions
    shared = len(graphs) > 1
    return {
        'chipset': binary.chipset,
        'precision': binary.precision,
        'qnn_sdk': qnn_sdk,
        'file': draft.link(file, f'{folder}/{file.name}'),
        'graphs': graphs,
        'provider_options': dict(binary.provider_options),
        'session_options': {'session.disable_cpu_ep_fallback': '1'} | ({'ep.share_ep_contexts': '1'} if shared else {}),
    }


def _license_notes() -> dict[str, str]:
    """Return the license of each part."""
    return {
        'bundle': 'Apache-2.0 for tables, manifest and README, see LICENSE.',
        'weights': 'The license of the checkpoint holds for graphs, binaries and embedding tables.',
        'binaries': "Made with Qualcomm's QNN SDK, as distributed with onnxruntime-qnn, whose license holds for them.",
    }
