"""The manifest of a bundle: its schema, and checks of the relations between its parts."""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from neodragon_phone.errors import BundleError
from neodragon_phone.schema import REMEDY, Flag, Items, Kind, Number, Optional, Record, Table, Text, Whole, wrong

NAME = 'manifest.json'
SCHEMA, VERSION = 'neodragon-bundle', 2
# A full-size manifest has about 1 MB.
_MOST_BYTES = 1 << 26

Manifest = Mapping[str, Any]

_SIZE = Whole(1, 1 << 24)
_SHAPE = Items(Whole(1), 0, 8)
_FILE_SHAPE = Record({'file': Text(), 'shape': _SHAPE})
_TENSOR = Record({'shape': _SHAPE, 'dtype': Text(('float32',))}, {'source': Text(), 'meaning': Text()})
_TOWER = Record(
    {
        'tokenizer': Text(),
        'tokens': _SIZE,
        'token_table': Text(),
        'position_table': Text(),
        'end_of_text': Record({'rule': Text(('first largest id', 'first of id'))}, {'id': Whole()}),
    }
)
_STEP = Record({'timestep': Number(), 'level': Number(), 'next_level': Number(), 'sinusoid': Text()})
_STAGE = Record(
    {
        'graph': Text(),
        'height': _SIZE,
        'width': _SIZE,
        'enter': Optional(Record({'alpha': Number(), 'beta': Number()})),
        'history': Items(Record({'distance': Whole(1, 4096), 'stage': Whole(0, 15)})),
        'first_unit_steps': Items(_STEP, 1, 1000),
        'steps': Items(_STEP, 1, 1000),
        'units': Items(Optional(Table(Record({'table': Text()}, {'padded': Text()}))), 1, 4096),
    }
)
_PICTURE_STEP = Record(
    {
        **{name: Number() for name in ('timestep', 'signal', 'noise', 'keep', 'take')},
        'next': Optional(Record({'signal': Number(), 'noise': Number()})),
    }
)
_FIRST_FRAME = Record(
    {
        'towers': Record({'first_frame_clip_l': _TOWER, 'first_frame_clip_g': _TOWER}),
        **dict.fromkeys(('height', 'width', 'latent_height', 'latent_width', 'latent_channels'), _SIZE),
        'scaling_factor': Number(),
        'embedding': Record(dict.fromkeys(('step', 'hidden_kernel', 'hidden_bias', 'output_kernel'), Text())),
        'steps': Items(_PICTURE_STEP, 1, 1000),
    }
)
_GRAPH = Record(
    {
        'precision': Text(),
        'portable': Items(Text(), 1, 2),
        'inputs': Table(_TENSOR),
        'outputs': Table(_TENSOR),
        'vector': Record({'file': Text(), 'compared': Items(Text(), 1), 'cpu_db': Number(), 'minimum_db': Number()}),
    }
)
_VIDEO = Record(
    {
        **dict.fromkeys(
            ('frames', 'height', 'width', 'frames_per_latent', 'latent_height', 'latent_width', 'latent_channels'),
            _SIZE,
        ),
        'latent_frames': Whole(1, 4096),
        'frames_per_second': Whole(1, 1000),
        'prompt_modifier': Text(),
        'negative_prompt': Text(),
        'normalization': Record(
            {
                **dict.fromkeys(('first_shift', 'first_scale', 'shift', 'scale'), Number()),
                'log_variance_range': Items(Number(), 2, 2),
            }
        ),
    }
)
_BINARY = Record(
    {
        'chipset': Text(),
        'file': Text(),
        'graphs': Table(Record({'wrapper': Text(), 'qnn_graph': Text()})),
        'provider_options': Table(Text()),
        'session_options': Table(Text()),
    },
    {'qnn_sdk': Text()},
)
_DENOISER = Record(
    {
        'patch': Whole(1, 64),
        'first_unit': Whole(0, 1),
        'gamma': Number(),
        'guidance': Optional(Number()),
        'first_guidance': Optional(Number()),
        'stages': Items(_STAGE, 1, 8),
    }
)
_VIDEO_VECTOR = Record(
    {
        'prompt': Text(),
        'seed': Whole(0, 2**64 - 1),
        'image': Optional(Text()),
        'latents': _FILE_SHAPE,
        'frames': _FILE_SHAPE,
        'cpu_db': Optional(Number()),
        'minimum_db': Optional(Number()),
    }
)
_MANIFEST: Kind = Record(
    {
        'schema': Text((SCHEMA,)),
        'version': Whole(1),
        'name': Text(),
        'minimum_runtime': Table(Text()),
        'video': _VIDEO,
        'text': Record(
            {
                'clip_l': _TOWER,
                'clip_g': _TOWER,
                'dt5': Record({'tokenizer': Text(), 'tokens': _SIZE, 'token_table': Text(), 'padded_key': Number()}),
            }
        ),
        'first_frame': Optional(_FIRST_FRAME),
        'denoiser': _DENOISER,
        'graphs': Table(_GRAPH),
        'phases': Items(Record({'name': Text(), 'graphs': Items(Text()), 'bytes': Table(Whole(0, 2**50))})),
        'tables': Table(Record({'file': Text(), 'dtype': Text(('float32',)), 'shape': _SHAPE})),
        'vectors': Record({'video': _VIDEO_VECTOR}),
        'chipsets': Table(Record({'soc_model': Whole(), 'htp_arch': Whole()}, {'aliases': Items(Text())})),
        'binaries': Items(_BINARY),
        'files': Table(Record({'bytes': Whole(0, 2**50), 'sha256': Text()})),
    },
    {'safety': Record({'checkpoint_has_checker': Flag()})},
)


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Return the manifest of a bundle, checked against its digest, its schema, and itself.

    Raises:
      BundleError: the file is missing, damaged, of another version, or contradicts itself.
    """
    path = folder / NAME
    try:
        with path.open('rb') as file:
            content = file.read(_MOST_BYTES + 1)
        recorded = (folder / f'{NAME}.sha256').read_bytes()
    except OSError as error:
        raise BundleError(
            f'{error.filename}: cannot be read ({error.strerror}). Give the folder of a bundle.'
        ) from None
    # The line that sha256sum writes; the whole of it is compared, so that no damage to this file passes.
    if len(content) > _MOST_BYTES or f'{hashlib.sha256(content).hexdigest()}  {NAME}\n'.encode() != recorded:
        raise BundleError(f'{path}: differs from {NAME}.sha256. {REMEDY}')
    try:
        manifest = json.loads(content.decode('utf-8'))
    except (ValueError, RecursionError):
        raise BundleError(f'{path}: not a JSON document. {REMEDY}') from None
    _check_version(path, manifest)
    _MANIFEST.check(manifest, '')
    _check_tables(manifest)
    _check_graphs(manifest)
    _check_video(manifest)
    _check_denoiser(manifest)
    return manifest


def _check_version(path: pathlib.Path, manifest: Any) -> None:
    """Raise BundleError for another version of the format; `_MANIFEST` refuses one that is no number."""
    version = manifest.get('version') if isinstance(manifest, dict) else None
    if isinstance(version, int) and version != VERSION:
        remedy = 'Update neodragon-phone' if version > VERSION else 'Export the bundle again'
        raise BundleError(f'{path}: version {version}; this player reads version {VERSION}. {remedy}.')


def array_bytes(shape: list[int], itemsize: int = 4) -> int:
    """Return the bytes of an array."""
    return math.prod(shape) * itemsize


def _check_tables(manifest: Manifest) -> None:
    """Raise BundleError unless every table fills its file."""
    for name, table in manifest['tables'].items():
        _check_bytes(manifest, f'tables.{name}', table['file'], array_bytes(table['shape']))


def _check_bytes(manifest: Manifest, path: str, file: str, wanted: int) -> None:
    """Raise BundleError unless a file is listed with the bytes that its arrays need."""
    entry = manifest['files'].get(file)
    if entry is None:
        raise BundleError(f'manifest.json: "{path}" names {file[:80]!r}, which "files" does not list. {REMEDY}')
    if entry['bytes'] != wanted:
        raise BundleError(f'manifest.json: "{path}" needs {wanted} bytes, {file[:80]!r} has {entry["bytes"]}. {REMEDY}')


def _check_graphs(manifest: Manifest) -> None:
    """Raise BundleError unless vectors fit their graphs, and phases and binaries name graphs that are there."""
    graphs = manifest['graphs']
    for name, graph in graphs.items():
        tensors = [*graph['inputs'].values(), *graph['outputs'].values()]
        total = sum(array_bytes(tensor['shape']) for tensor in tensors)
        _check_bytes(manifest, f'graphs.{name}.vector', graph['vector']['file'], total)
        for output in graph['vector']['compared']:
            if output not in graph['outputs']:
                raise wrong(f'graphs.{name}.vector.compared', output, 'an output of the graph')
    in_phases = [name for phase in manifest['phases'] for name in phase['graphs']]
    if sorted(in_phases) != sorted(graphs):
        raise wrong('phases', in_phases, 'every graph exactly once')
    for index, binary in enumerate(manifest['binaries']):
        if not binary['graphs'].keys() <= graphs.keys():
            raise wrong(f'binaries[{index}].graphs', list(binary['graphs']), 'graphs of the bundle')
        if binary['chipset'] not in manifest['chipsets']:
            raise wrong(f'binaries[{index}].chipset', binary['chipset'], 'one of "chipsets"')


def _check_video(manifest: Manifest) -> None:
    """Raise BundleError unless the sizes of the video, its latents, its graphs and its vectors agree."""
    video, graphs = manifest['video'], manifest['graphs']
    latents = [video[f'latent_{side}'] for side in ('frames', 'height', 'width', 'channels')]
    pixels = [video[name] for name in ('frames', 'height', 'width')]
    if video['frames'] != 1 + video['frames_per_latent'] * (latents[0] - 1):
        raise wrong('video.frames', video['frames'], 'the number that the latent frames decode to')
    for name in ('clip_l', 'clip_g', 'dt5', 'context_adapter', 'denoiser_modulation', 'video_decoder'):
        if name not in graphs:
            raise BundleError(f'manifest.json: "graphs" has no {name}. {REMEDY}')
    decoder = graphs['video_decoder']
    _check_shape('graphs.video_decoder.inputs.latent', decoder['inputs'].get('latent'), [1, *latents[1:]])
    _check_shape('graphs.video_decoder.outputs.frames', decoder['outputs'].get('frames'),
                 [video['frames_per_latent'], *pixels[1:], 3])  # fmt: skip
    vector = manifest['vectors']['video']
    _check_shape('vectors.video.latents', vector['latents'], latents)
    _check_bytes(manifest, 'vectors.video.latents', vector['latents']['file'], array_bytes(latents))
    _check_bytes(
        manifest, 'vectors.video.frames', vector['frames']['file'], array_bytes(vector['frames']['shape'], itemsize=1)
    )


def _check_shape(path: str, tensor: Mapping[str, Any] | None, wanted: list[int]) -> None:
    if tensor is None or tensor['shape'] != wanted:
        raise wrong(path, tensor and tensor['shape'], f'an array of shape {wanted}')


def _check_denoiser(manifest: Manifest) -> None:
    """Raise BundleError unless every stage has its graph, its grid, and the tables of all units and steps."""
    stages, video = manifest['denoiser']['stages'], manifest['video']
    for number, stage in enumerate(stages):
        path, coarser = f'denoiser.stages[{number}]', len(stages) - 1 - number
        graph = manifest['graphs'].get(stage['graph'])
        if graph is None:
            raise wrong(f'{path}.graph', stage['graph'], 'a graph of the bundle')
        for side in ('height', 'width'):
            if stage[side] << coarser != video[f'latent_{side}']:
                raise wrong(f'{path}.{side}', stage[side], f'the latent {side} halved {coarser} times')
            if stage[side] % manifest['denoiser']['patch']:
                raise wrong('denoiser.patch', manifest['denoiser']['patch'], f'a divisor of the {side} of all stages')
        if (stage['enter'] is None) != (number == 0):
            raise wrong(f'{path}.enter', stage['enter'], 'null in the first stage, an object in the others')
        if any(entry['stage'] > number for entry in stage['history']):
            raise wrong(f'{path}.history', stage['history'], 'stages up to this one')
        if len(stage['units']) != video['latent_frames']:
            raise wrong(f'{path}.units', f'{len(stage["units"])} units', f'{video["latent_frames"]} units')
        _check_stage_tables(manifest, path, stage, graph)


def _check_stage_tables(manifest: Manifest, path: str, stage: Mapping[str, Any], graph: Mapping[str, Any]) -> None:
    """Raise BundleError unless the tables of a stage exist and have the shapes of the graph's inputs."""
    tables, first = manifest['tables'], manifest['denoiser']['first_unit']
    sinusoid = manifest['graphs']['denoiser_modulation']['inputs'].get('timestep')
    for step in (*stage['first_unit_steps'], *stage['steps']):
        _check_shape(f'{path}.steps', tables.get(step['sinusoid']), sinusoid['shape'] if sinusoid else [])
    wanted = {name for name, tensor in graph['inputs'].items() if tensor.get('source') == 'table'}
    for unit, entry in enumerate(stage['units'][first:], first):
        if entry is None or entry.keys() != wanted:
            raise wrong(f'{path}.units[{unit}]', entry and list(entry), f'tables for {sorted(wanted)}')
        for name, item in entry.items():
            for table in (item[key] for key in ('table', 'padded') if key in item):
                _check_shape(f'{path}.units[{unit}].{name}', tables.get(table), graph['inputs'][name]['shape'])
            shape = graph['inputs'][name]['shape']
            if 'padded' in item and (len(shape) < 2 or shape[1] < manifest['text']['dt5']['tokens']):
                raise wrong(f'{path}.units[{unit}].{name}.padded', item['padded'], 'for an input with a row per token')
