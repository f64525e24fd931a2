"""Compilation of ONNX graphs to QNN context binaries for Snapdragon chipsets, with metadata for deployment tools.

A binary holds one graph, or several that share their weights: the stages of the denoiser are one model at three shapes.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import onnx

from export.qnn.chipsets import Target, check_binary
from export.qnn.htp import ContextGraph, HtpContext, HtpSession, Opened, SharedGraph
from export.qnn.latency import estimate
from export.qnn.static_view import dump_options, read_view
from export.quantize.qdq import quantization_parameters
from neodragon_jax.base.atomic import atomic_folder, scratch_folder
from neodragon_jax.base.errors import InputError
from neodragon_jax.base.files import file_sha256

PRECISIONS = ('w8a16', 'fp16')
Simulate = Callable[[Mapping[str, ContextGraph]], dict[str, Any]]
_TOOLS = ('neodragon-jax', 'jax', 'jaxlib', 'flax', 'numpy', 'jax2onnx', 'onnx', 'onnxruntime', 'onnxruntime-qnn')


def provider_options(target: Target, precision: str) -> dict[str, str]:
    """Return QNN's options. All are set here, because QNN silently ignores unknown ones."""
    options = {'soc_model': str(target.soc_model), 'htp_arch': str(target.htp_arch)}
    return options | {'enable_htp_fp16_precision': '1'} if precision == 'fp16' else options


def compile_graph(
    name: str, model: pathlib.Path, folder: pathlib.Path, target: Target, precision: str, source: dict[str, Any]
) -> dict[str, Any]:
    """Compile a graph into `folder`: the context binary, its ONNX wrapper, metadata.json.

    Args:
      name: of the graph.
      model: ONNX file, quantized or float as the precision says.
      folder: created when complete; replaces an existing one.
      source: origin of the graph, for the metadata.
    Returns:
      The metadata.
    Raises:
      InputError: the graph does not compile; the folder is left unchanged.
    """
    with atomic_folder(folder, replace=True) as draft, scratch_folder(draft.parent) as dump:
        wrapper = draft / f'{name}.onnx'
        options = provider_options(target, precision) | dump_options(dump)
        with HtpSession(model, options, context=wrapper) as session:
            opened = session.opened
        specs = _tensor_specs(model) | {'static_view': _static_view(dump, precision)}
        return _write_metadata(draft, name, target, precision, specs, opened, {'source': source})


def compile_together(
    name: str,
    models: Mapping[str, pathlib.Path],
    folder: pathlib.Path,
    target: Target,
    precision: str,
    source: dict[str, Any],
    simulate: Simulate | None = None,
) -> dict[str, Any]:
    """Compile graphs into one context binary in which equal weights are stored once.

    The x86 simulator runs the graphs only in the process that compiles them (see `htp.HtpContext`), so `simulate` is
    called here.

    Args:
      name: of the binary.
      models: ONNX file of each graph.
      folder: folder for the binary, a wrapper per graph, and metadata.json; as in `compile_graph`.
      simulate: runs the graphs, by name, and returns the metadata entry `simulated`; None skips the simulation.
    Returns:
      The metadata; `graphs` has the inputs, outputs and counts of each graph.
    Raises:
      InputError: a graph does not compile; the folder is left unchanged.
    """
    with atomic_folder(folder, replace=True) as draft, scratch_folder(draft.parent) as scratch:
        dumps = {graph: scratch / graph for graph in models}
        for dump in dumps.values():
            dump.mkdir()
        options = provider_options(target, precision)
        jobs = {
            graph: SharedGraph(model, draft / f'{graph}.onnx', options | dump_options(dumps[graph]))
            for graph, model in models.items()
        }
        with HtpContext(jobs) as context:
            opened = context.opened
            simulated = simulate({graph: context.runner(graph) for graph in models}) if simulate else None
        specs = {
            graph: _tensor_specs(model) | {'static_view': _static_view(dumps[graph], precision)}
            for graph, model in models.items()
        }
        last = {'simulated': simulated, 'source': source}
        return _write_metadata(draft, name, target, precision, {'graphs': specs}, opened, last)


def _write_metadata(
    folder: pathlib.Path,
    name: str,
    target: Target,
    precision: str,
    specs: Mapping[str, Any],
    opened: Opened,
    last: Mapping[str, Any],
) -> dict[str, Any]:
    """Write metadata.json into the folder of a compiled binary and return it."""
    metadata = {
        'name': name,
        **_binary_entry(folder, target, precision),
        **specs,
        'compile': {'seconds': round(opened.seconds, 1), 'peak_gb': round(opened.peak_gb, 2)},
        **last,
    }
    (folder / 'metadata.json').write_text(json.dumps(metadata, indent=2) + '\n')
    return metadata


def binary_mb(metadata: Mapping[str, Any]) -> float:
    """Return the size of the context binary in megabytes (10^6 bytes), from its metadata."""
    return sum(entry['bytes'] for file, entry in metadata['model_files'].items() if file.endswith('.bin')) / 1e6


def _binary_entry(folder: pathlib.Path, target: Target, precision: str) -> dict[str, Any]:
    """Return the metadata entries of a folder with one binary and its wrappers."""
    wrappers, binaries = sorted(folder.glob('*.onnx')), sorted(folder.glob('*.bin'))
    if not wrappers or len(binaries) != 1:
        raise InputError(
            f'QNN wrote {len(binaries)} context binaries, not one. Check that onnxruntime-qnn is the pinned version.'
        )
    check_binary(binaries[0], target)
    return {
        'runtime': 'qnn_context_binary',
        'precision': precision,
        'chipset': {key: value for key, value in dataclasses.asdict(target).items() if key != 'aliases'},
        'model_files': {path.name: _file_entry(path) for path in (*wrappers, *binaries)},
        'tool_versions': tool_versions() | {'qnn_sdk': _sdk_version(wrappers[0])},
    }


def _static_view(dump: pathlib.Path, precision: str) -> dict[str, Any]:
    """Return the counts of a graph and the latency estimated from them, which is valid for 16-bit activations."""
    view = read_view(dump, half=precision == 'fp16')
    return view.summary() | {'estimated_ms_on_8_elite': estimate(view).to_json()}


def tool_versions() -> dict[str, str]:
    """Return the versions of all packages that affect a binary."""
    return {tool: importlib.metadata.version(tool) for tool in _TOOLS}


def _file_entry(path: pathlib.Path) -> dict[str, Any]:
    return {'bytes': path.stat().st_size, 'sha256': file_sha256(path)}


def _tensor_specs(path: pathlib.Path) -> dict[str, Any]:
    """Return the shape, type and HTP quantization of the inputs and outputs."""
    graph = onnx.load(path, load_external_data=False).graph
    parameters = quantization_parameters(path)

    def spec(value: onnx.ValueInfoProto) -> dict[str, Any]:
        tensor = value.type.tensor_type
        entry = {
            'shape': [dim.dim_value for dim in tensor.shape.dim],
            'dtype': str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)),
        }
        return entry | ({'quantized_inside_to': parameters[value.name]} if value.name in parameters else {})

    return {
        'inputs': {value.name: spec(value) for value in graph.input},
        'outputs': {value.name: spec(value) for value in graph.output},
    }


def _sdk_version(wrapper: pathlib.Path) -> str:
    """Return the version of the QNN SDK that a context binary was made with."""
    (node,) = onnx.load(wrapper, load_external_data=False).graph.node
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return values['ep_sdk_version'].decode()
