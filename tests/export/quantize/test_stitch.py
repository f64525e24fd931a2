"""The denoiser's graphs: all forms against JAX, stitched from pieces, quantized, and several in one binary."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import numpy_helper

from export.graphs.denoiser import FORMS, SHIPPED, Form, denoiser_graphs
from export.graphs.modulation import modulation_graph as make_modulation_graph
from export.graphs.runners import OnnxSession
from export.graphs.stored_params import StoredParams
from export.graphs.table import MODULATION, PhoneGraph
from export.graphs.to_onnx import to_onnx
from export.host.denoiser_host import DenoiserHost
from export.measure.snr import snr_db
from export.qnn.chipsets import find_target
from export.qnn.compile import binary_mb, compile_graph, compile_together, provider_options
from export.qnn.htp import ContextGraph, HtpSession
from export.quantize.key_value import choose_bits
from export.quantize.qdq import to_fp16, to_w8a16
from export.quantize.stitch import export_chain, quantize_chain
from export.rewrite.onnx_graph import constants_of, producers_of
from neodragon_jax.base.errors import InputError
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.pyramid.sampler import Prompt, jax_denoiser
from support.arrays import normal
from support.goldens import TINY_CHECKPOINT

UNITS, GRID, TEXT_TOKENS, STAGES, STAGE = 3, (4, 8), 16, 3, 2
LATENT_GRIDS = ((2, 4), (4, 8), (8, 16))
EXACT_DB = 110.0


@pytest.fixture(scope='module')
def reference(denoiser):
    """Flows of the whole model in JAX by unit."""
    model, params = denoiser
    run, host = jax_denoiser(model.apply, params), DenoiserHost(model, params)
    return {unit: host.patches(run(STAGE, *call(denoiser, unit))) for unit in range(UNITS + 1)}


def call(denoiser: tuple[PyramidMMDiT, Any], unit: int, stage: int = STAGE) -> tuple[Any, ...]:
    """Return the denoiser's arguments after the stage for a unit, with random values in the padding of its history."""
    stages = [max(stage - distance + 1, 0) for distance in range(UNITS, 0, -1)]
    history = [jnp.asarray(normal(unit + i, 1, 1, *LATENT_GRIDS[level], 16)) for i, level in enumerate(stages)]
    mask = (np.arange(TEXT_TOKENS) < 9)[None].astype(np.int32)
    prompt = Prompt(*map(jnp.asarray, (normal(1, 1, TEXT_TOKENS, denoiser[0].config.width), mask, normal(2, 1, 48))))
    x = jnp.asarray(normal(unit + 9, 1, 1, *LATENT_GRIDS[stage], 16))
    return history, x, jnp.array([unit]), prompt, jnp.array([700.0])


def chain(denoiser: tuple[PyramidMMDiT, Any], form: Form, stage: int = STAGE) -> PhoneGraph:
    return denoiser_graphs(*denoiser, UNITS, GRID, TEXT_TOKENS, STAGES, form)[stage]


def feeds(denoiser: tuple[PyramidMMDiT, Any], form: Form, units: range, stage: int = STAGE) -> list[Any]:
    host = DenoiserHost(*denoiser, form)
    return [host.stage_inputs(*call(denoiser, unit, stage)) for unit in units]


@pytest.mark.parametrize('name', FORMS)
def test_every_form_is_the_model(name, denoiser, reference, tmp_path):
    """The stitched graph equals the model for every unit, with random values in the padding."""
    graph = chain(denoiser, FORMS[name])
    operations = export_chain(graph, tmp_path / 'graph.onnx')
    model = onnx.load(tmp_path / 'graph.onnx')
    onnx.checker.check_model(model)
    assert operations == len(model.graph.node)
    session = OnnxSession(tmp_path / 'graph.onnx')
    for unit, sample in enumerate(feeds(denoiser, FORMS[name], range(UNITS + 1))):
        assert {key: array.shape for key, array in sample.items()} == dict(graph.inputs)
        assert snr_db(reference[unit], session.run(sample)['flow']) > EXACT_DB


def test_the_patch_embedding_is_stored_in_two_parts(denoiser, tmp_path):
    """Its rounding error, the same in all calls of a video, falls at least 30 dB below that of 8 bits."""
    embed, samples, reached = chain(denoiser, SHIPPED).pieces[0], feeds(denoiser, SHIPPED, range(UNITS + 1)), {}
    assert embed.name.endswith('embed')
    assert embed.in_two_parts
    to_onnx(embed, tmp_path / 'float.onnx')
    for parts in (False, True):
        piece = dataclasses.replace(embed, in_two_parts=parts)
        whole = dataclasses.replace(embed, pieces=(piece,), fused=True)
        path = tmp_path / f'{parts}.onnx'
        quantize_chain(whole, path, samples, to_w8a16)
        (name,) = embed.outputs
        calls = [{'patches': sample['patches']} for sample in samples]
        float_graph, session = OnnxSession(tmp_path / 'float.onnx'), OnnxSession(path)
        reached[parts] = min(snr_db(float_graph.run(call)[name], session.run(call)[name]) for call in calls)
    assert reached[True] > reached[False] + 30


def test_whole_graph_equals_its_pieces(denoiser, tmp_path):
    graph = chain(denoiser, SHIPPED)
    to_onnx(graph, tmp_path / 'whole.onnx')
    export_chain(graph, tmp_path / 'stitched.onnx')
    (sample,) = feeds(denoiser, SHIPPED, range(2, 3))
    want, got = (OnnxSession(tmp_path / f'{name}.onnx').run(sample)['flow'] for name in ('whole', 'stitched'))
    assert snr_db(want, got) > EXACT_DB


def test_graphs_for_a_given_first_frame(denoiser, reference, tmp_path):
    form = Form(supports_frame_zero=False)
    graph = chain(denoiser, form)
    export_chain(graph, tmp_path / 'graph.onnx')
    session = OnnxSession(tmp_path / 'graph.onnx')
    for unit, sample in enumerate(feeds(denoiser, form, range(1, UNITS + 1)), 1):
        assert snr_db(reference[unit], session.run(sample)['flow']) > EXACT_DB
    with pytest.raises(InputError, match='frame 0'):
        feeds(denoiser, form, range(1))


def test_modulation_graph_feeds_the_stages(denoiser, reference, tmp_path):
    """All vectors are computed once for all units of a video."""
    graph = make_modulation_graph(*denoiser)
    to_onnx(graph, tmp_path / 'modulation.onnx')
    session, calls = OnnxSession(tmp_path / 'modulation.onnx'), []

    def modulate(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append(inputs)
        return session.run(inputs)

    here, there = DenoiserHost(*denoiser), DenoiserHost(*denoiser, modulate=modulate)
    for unit in (1, 2):
        want, got = (host.stage_inputs(*call(denoiser, unit)) for host in (here, there))
        assert set(got) == set(want)
        assert all(snr_db(want[name], got[name]) > EXACT_DB for name in want)
    assert len(calls) == 1
    gains = onnx.load(tmp_path / 'modulation.onnx').graph
    adds = [node for node in gains.node if node.op_type == 'Add']
    assert len(adds) == 1, 'the 1 of 1 + scale is in a bias; only timestep and prompt are added'


@pytest.fixture(scope='module')
def quantized(denoiser, tmp_path_factory) -> pathlib.Path:
    """The shipped form of the last stage in W8A16, calibrated on all units."""
    path = tmp_path_factory.mktemp('quantized') / 'denoiser_stage2.onnx'
    quantize_chain(chain(denoiser, SHIPPED), path, feeds(denoiser, SHIPPED, range(UNITS + 1)), to_w8a16)
    return path


def test_quantized_piece_by_piece(denoiser, quantized, reference):
    session = OnnxSession(quantized)
    for unit, sample in enumerate(feeds(denoiser, SHIPPED, range(UNITS + 1))):
        assert snr_db(reference[unit], session.run(sample)['flow']) > 35
    graph = onnx.load(quantized).graph
    producers = producers_of(graph)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    # Every input is quantized once, and nothing is quantized again between pieces.
    quantizes = [node.input[0] for node in graph.node if node.op_type == 'QuantizeLinear']
    inputs = {value.name for value in graph.input}
    assert all(quantizes.count(name) == 1 for name in inputs)
    conversions = [producers[name] for name in quantizes if name in producers and is_dequantized(producers[name])]
    # The rotary matrices once for all blocks; keys and values once per block, before prefixes are sliced from them.
    assert len(conversions) == 1 + 2 * denoiser[0].config.num_layers
    for node in graph.node:
        if node.op_type == 'LayerNormalization':
            assert len(node.input) == 2 and constants[producers[node.input[1]].input[2]].dtype == np.int16
        if node.op_type == 'MatMul':
            assert constants[producers[node.input[1]].input[2]].dtype == np.int16


def is_dequantized(node: onnx.NodeProto) -> bool:
    return node.op_type == 'DequantizeLinear'


@pytest.fixture(scope='module')
def few_bits(denoiser, tmp_path_factory) -> pathlib.Path:
    """The same graph with keys and values in 8 bits."""
    path = tmp_path_factory.mktemp('few_bits') / 'denoiser_stage2.onnx'
    samples = feeds(denoiser, SHIPPED, range(UNITS + 1))
    quantize_chain(chain(denoiser, SHIPPED), path, samples, partial(to_w8a16, key_value_bits=8))
    return path


def test_8_bits_of_keys_and_values_change_types_only(denoiser, reference, few_bits, quantized):
    (sample,) = feeds(denoiser, SHIPPED, range(2, 3))
    assert snr_db(reference[2], OnnxSession(few_bits).run(sample)['flow']) > 27
    kinds = {}
    for path in (few_bits, quantized):
        graph = onnx.load(path).graph
        producers, constants = producers_of(graph), constants_of(graph)
        zeros = [producers[node.input[1]].input[2] for node in graph.node if node.op_type == 'MatMul']
        kinds[path] = {numpy_helper.to_array(constants[name]).dtype for name in zeros}
        kinds[path, 'count'] = collections.Counter(node.op_type for node in graph.node)
    assert kinds[few_bits, 'count'] == kinds[quantized, 'count'], 'the same operations and conversions'
    assert np.dtype(np.int8) in kinds[few_bits] and kinds[quantized] == {np.dtype(np.int16)}


def test_16_bits_need_a_measured_reason():
    """16 bits are used only where 8 bits miss the target and 16 bits improve the ratio."""
    written = []

    def write(bits: int, few: float, many: float) -> float:
        written.append(bits)
        return {8: few, 16: many}[bits]

    assert choose_bits(partial(write, few=27.0, many=40.0), 27.0).bits == 8 and written == [8]
    better = choose_bits(partial(write, few=20.0, many=28.0), 27.0)
    assert better.bits == 16 and better.db == 28.0 and written[1:] == [8, 16]
    assert better.recipe()['key_value_reason'] == '8 bits reach 20.0 dB of 27.0; 16 gain 8.0 dB'
    hardly = choose_bits(partial(write, few=20.0, many=20.1), 27.0)
    assert hardly.bits == 8 and written[-1] == 8 and set(hardly.reached_db) == {8, 16}


def test_parameters_are_read_when_needed(denoiser, tmp_path):
    stored = StoredParams(TINY_CHECKPOINT / 'diffusion_transformer_320p')
    assert stored.module == denoiser[0] and set(stored) == set(denoiser[1])
    for name, tree in denoiser[1].items():
        assert jax.tree.all(jax.tree.map(np.array_equal, stored[name], tree))
    shutil.copytree(TINY_CHECKPOINT / 'diffusion_transformer_320p', tmp_path / 'cut')
    (weights,) = (tmp_path / 'cut').glob('*.safetensors')
    tensors = safetensors.numpy.load_file(weights)
    del tensors['proj_out.bias']
    safetensors.numpy.save_file(tensors, weights)
    with pytest.raises(InputError, match=r'proj_out\.bias is missing'):
        StoredParams(tmp_path / 'cut')
    weights.write_bytes(b'short')
    with pytest.raises(InputError, match='truncated'):
        StoredParams(tmp_path / 'cut')


def test_chain_without_samples_is_refused(denoiser, tmp_path):
    with pytest.raises(InputError, match='no calibration inputs'):
        quantize_chain(chain(denoiser, SHIPPED), tmp_path / 'graph.onnx', [], to_w8a16)
    assert not list(tmp_path.glob('*.onnx')) and not list(tmp_path.glob('.pieces*'))


@pytest.mark.qnn
def test_quantized_stage_on_the_simulator(denoiser, quantized, reference, tmp_path):
    metadata = compile_graph('stage', quantized, tmp_path / 'stage', find_target('sm8750'), 'w8a16', {})
    counts = metadata['static_view']
    assert not counts['float_operations'] and counts['operations'] < 200
    # Per block, only to split and merge heads: two for queries, one for keys, one for values, two for the outputs.
    assert counts['transposes'] == 6 * denoiser[0].config.num_layers - 2
    assert counts['estimated_ms_on_8_elite']['flat_ms'] > 0
    (sample,) = feeds(denoiser, SHIPPED, range(2, 3))
    with HtpSession(tmp_path / 'stage' / 'stage.onnx', {'soc_model': '69', 'htp_arch': '79'}) as session:
        assert snr_db(reference[2], session.run(sample)['flow']) > 35


@pytest.mark.qnn
def test_8_bits_of_keys_and_values_on_the_simulator(denoiser, few_bits, reference, tmp_path):
    """QNN adds no conversion, and its result matches the graph on the CPU."""
    metadata = compile_graph('stage', few_bits, tmp_path / 'stage', find_target('sm8750'), 'w8a16', {})
    assert not metadata['static_view']['float_operations']
    (sample,) = feeds(denoiser, SHIPPED, range(2, 3))
    on_cpu = OnnxSession(few_bits).run(sample)['flow']
    with HtpSession(tmp_path / 'stage' / 'stage.onnx', {'soc_model': '69', 'htp_arch': '79'}) as session:
        simulated = session.run(sample)['flow']
    assert snr_db(reference[2], simulated) > 30
    assert snr_db(on_cpu, simulated) > 40


@pytest.mark.qnn
@pytest.mark.parametrize('chipset', ['sm8550', 'sm8650', 'sc8380xp', 'sm8850'])
def test_other_chipsets(quantized, chipset, tmp_path):
    target = find_target(chipset)
    metadata = compile_graph('stage', quantized, tmp_path / 'stage', target, 'w8a16', {})
    assert metadata['chipset']['soc_model'] == target.soc_model
    assert not metadata['static_view']['float_operations']


@pytest.mark.qnn
def test_modulation_in_fp16(denoiser, tmp_path):
    to_onnx(make_modulation_graph(*denoiser), tmp_path / 'float.onnx')
    (tmp_path / 'half').mkdir()
    to_fp16(tmp_path / 'float.onnx', tmp_path / 'half' / 'graph.onnx')
    target = find_target('sm8750')
    compile_graph(MODULATION, tmp_path / 'half' / 'graph.onnx', tmp_path / 'out', target, 'fp16', {})
    inputs = DenoiserHost(*denoiser).modulation_inputs(call(denoiser, 1)[3], jnp.array([700.0]))
    want = OnnxSession(tmp_path / 'float.onnx').run(inputs)
    options = {'soc_model': '69', 'htp_arch': '79', 'enable_htp_fp16_precision': '1'}
    with HtpSession(tmp_path / 'out' / f'{MODULATION}.onnx', options) as session:
        got = session.run(inputs)
    assert min(snr_db(want[name], got[name]) for name in want) > 45


@pytest.fixture(scope='module')
def stages(denoiser, quantized, tmp_path_factory) -> dict[str, pathlib.Path]:
    """All stages in W8A16."""
    folder = tmp_path_factory.mktemp('stages')
    models = {f'denoiser_stage{stage}': folder / f'denoiser_stage{stage}.onnx' for stage in (0, 1)}
    for stage, path in enumerate(models.values()):
        quantize_chain(chain(denoiser, SHIPPED, stage), path, feeds(denoiser, SHIPPED, range(1, 3), stage), to_w8a16)
    return {**models, 'denoiser_stage2': quantized}


@pytest.mark.long
@pytest.mark.qnn
def test_stages_share_weights(denoiser, stages, tmp_path):
    """Three stages in one binary smaller than separate ones; each matches its separate binary bit for bit."""
    target, samples = find_target('sm8750'), {}
    for stage, name in enumerate(stages):
        (samples[name],) = feeds(denoiser, SHIPPED, range(2, 3), stage)
    flows: dict[str, np.ndarray] = {}

    def simulate_all(runners: Mapping[str, ContextGraph]) -> dict[str, Any]:
        flows.update({name: runners[name].run(samples[name])['flow'] for name in reversed(runners)})
        return {'ran': list(runners)}

    metadata = compile_together('denoiser', stages, tmp_path / 'shared', target, 'w8a16', {}, simulate_all)
    assert metadata['simulated'] == {'ran': list(stages)} and set(metadata['graphs']) == set(stages)
    alone = 0.0
    for name, model in stages.items():
        own = compile_graph(name, model, tmp_path / name, target, 'w8a16', {})
        alone += binary_mb(own)
        assert metadata['graphs'][name]['static_view'] == own['static_view']
        with HtpSession(tmp_path / name / f'{name}.onnx', provider_options(target, 'w8a16')) as session:
            np.testing.assert_array_equal(flows[name], session.run(samples[name])['flow'])
    assert binary_mb(metadata) < 0.9 * alone
    on_disk = json.loads((tmp_path / 'shared' / 'metadata.json').read_text())
    assert {path.name for path in (tmp_path / 'shared').iterdir()} == {*on_disk['model_files'], 'metadata.json'}
    with pytest.raises(InputError, match='simulator cannot load a binary of several graphs'):
        HtpSession(tmp_path / 'shared' / 'denoiser_stage1.onnx', provider_options(target, 'w8a16'))


@pytest.mark.qnn
def test_failed_sharing_leaves_nothing(stages, tmp_path):
    (tmp_path / 'bad.onnx').write_bytes(b'no graph')
    models = {**stages, 'denoiser_stage0': tmp_path / 'bad.onnx'}
    with pytest.raises(InputError, match=r'bad\.onnx'):
        compile_together('denoiser', models, tmp_path / 'broken', find_target('sm8750'), 'w8a16', {})
    assert [path.name for path in tmp_path.iterdir()] == ['bad.onnx']
