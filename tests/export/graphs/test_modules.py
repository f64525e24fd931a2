"""Every module except the denoiser as a phone graph, in float ONNX, FP16 and W8A16, against the program in JAX."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, create_calibrator

from export.graphs import text as text_graphs
from export.graphs.runners import Call, JaxRunner, OnnxPool, OnnxSession
from export.graphs.table import GRAPH_SPECS, PhoneGraph
from export.graphs.to_onnx import to_onnx
from export.host import graph_program, modules
from export.measure.snr import lowest_db, snr_db
from export.quantize.qdq import quantized_operations, to_w8a16
from export.quantize.ranges import METHODS, measure_ranges
from export.quantize.two_parts import RECIPE, quantize_to_target
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.checkpoint.params import cast
from neodragon_jax.generation import pipeline
from neodragon_jax.generation.param_store import Store
from neodragon_jax.generation.plan import make_plan
from neodragon_jax.models.t5 import T5EncoderWithProjection
from support.arrays import normal
from support.goldens import TINY_CHECKPOINT, relative_error

PROMPT = 'a red ball rolls down a green hill'
EXACT_DB = 100.0
ATTENTION = {'Reshape', 'Softmax', 'MatMul', 'Gemm', 'Transpose', 'Add'}
NETWORK = {'Conv', 'GroupNormalization', 'Sigmoid', 'Mul', *ATTENTION}
OPERATIONS = {
    'clip_l': {'LayerNormalization', 'Sigmoid', 'Mul', *ATTENTION},
    'clip_g': {'LayerNormalization', 'Gelu', *ATTENTION},
    'dt5': {'RMSNormalization', 'Gelu', 'Mul', 'Relu', *ATTENTION},
    'context_adapter': {'Gemm', 'Gelu', 'Max', 'Concat'},
    'first_frame_clip_l': {'LayerNormalization', 'Sigmoid', 'Mul', *ATTENTION},
    'first_frame_clip_g': {'LayerNormalization', 'Gelu', *ATTENTION},
    'first_frame_unet': {'LayerNormalization', 'Gelu', 'Split', 'Concat', 'Resize', *NETWORK},
    'first_frame_decoder': {'Resize', *NETWORK},
    'video_encoder': NETWORK,
    'video_decoder': {'Conv', 'Relu', 'Tanh', 'Mul', 'Add', 'Concat', 'Split', 'Resize', 'Transpose'},
    'super_resolution': {'Conv', 'Clip', 'DepthToSpace', 'Transpose'},
}


@pytest.fixture(scope='module')
def runners(graphs) -> dict[str, JaxRunner]:
    return {name: JaxRunner(module, Store()) for name, module in graphs.items()}


@pytest.fixture(scope='module')
def host(options) -> graph_program.TextHost:
    return graph_program.TextHost.load(options)


@pytest.fixture(scope='module')
def float_graphs(graphs, tmp_path_factory) -> dict[str, pathlib.Path]:
    """All modules as float ONNX files."""
    folder = tmp_path_factory.mktemp('float')
    for name, module in graphs.items():
        to_onnx(module, folder / f'{name}.onnx')
    return {name: folder / f'{name}.onnx' for name in graphs}


def make_feeds(module: PhoneGraph, seed: int = 0) -> dict[str, np.ndarray]:
    """Return valid inputs: a one-hot `end`, a bias `keys`, a picture `frame` in [0, 1], and noise for all others."""
    feeds = {name: normal(seed + index, *shape) for index, (name, shape) in enumerate(module.inputs.items())}
    if 'end' in feeds:
        feeds['end'] = np.eye(feeds['end'].shape[1], dtype=np.float32)[[9]]
    if 'keys' in feeds:
        feeds['keys'] = np.where(np.arange(feeds['keys'].shape[1]) < 30, 0, -1e4).astype(np.float32)[None]
    if 'frame' in feeds:
        feeds['frame'] = np.random.default_rng(seed).uniform(size=feeds['frame'].shape).astype(np.float32)
    return feeds


def test_table_has_a_row_for_every_module(graphs):
    assert set(graphs) <= set(GRAPH_SPECS) and set(graphs) == set(OPERATIONS)
    for name in graphs:
        deployment = GRAPH_SPECS[name]
        assert deployment.precision in ('fp16', 'w8a16') and deployment.target_db > 0
        assert bool(deployment.calibration_samples) == (deployment.precision == 'w8a16')


def test_onnx_computes_what_jax_computes(graphs, runners, float_graphs):
    for name, module in graphs.items():
        feeds = make_feeds(module)
        want, got = runners[name].run(feeds), OnnxSession(float_graphs[name]).run(feeds)
        assert list(got) == list(module.outputs)
        for output in module.outputs:
            assert snr_db(want[output], got[output]) > EXACT_DB, (name, output)


def test_a_pool_holds_one_group_of_graphs(graphs, float_graphs):
    """Graphs of a group stay open until a graph of another group runs; results equal those of single sessions."""
    pool, names = OnnxPool(), ('clip_l', 'context_adapter', 'super_resolution')
    runners = [pool.runner(float_graphs[name], name[0]) for name in names]
    for name, runner, held in zip(names, runners, (1, 2, 1), strict=True):
        feeds = make_feeds(graphs[name])
        want, got = OnnxSession(float_graphs[name]).run(feeds), runner.run(feeds)
        assert len(pool._open) == held
        for output in want:
            np.testing.assert_array_equal(got[output], want[output])


def test_graphs_are_native_and_lean(graphs, float_graphs):
    """One operation per norm and activation, no gather or shape arithmetic, transposes only at inputs and outputs."""
    for name, path in float_graphs.items():
        graph = onnx.load(path).graph
        kinds = {node.op_type for node in graph.node}
        assert kinds <= OPERATIONS[name], (name, kinds - OPERATIONS[name])
        assert [value.name for value in graph.input] == list(graphs[name].inputs)
    turns = {
        name: sum(node.op_type == 'Transpose' for node in onnx.load(float_graphs[name]).graph.node)
        for name in ('video_decoder', 'super_resolution')
    }
    assert turns == {'video_decoder': 10 + 1 + 9, 'super_resolution': 2}, 'each input and output once'


def test_decoder_has_each_weight_once(graphs, float_graphs):
    weights = graphs['video_decoder'].read()
    kernels = sum(leaf.ndim == 4 for leaf in jax.tree.leaves(weights))
    tensors = onnx.load(float_graphs['video_decoder']).graph.initializer
    assert sum(len(tensor.dims) == 4 for tensor in tensors) == kernels


def test_graphs_in_the_program_equal_the_program(host, runners):
    """Encoded prompts and images from the graphs and the host equal those of the pipeline."""
    base = pipeline.load(TINY_CHECKPOINT, 'hybrid', dtype=jnp.float32)
    ours = graph_program.components(host, runners, base.denoise, base)
    prompts = [PROMPT, 'a ship']
    for want, got in zip(base.encode_prompt(prompts), ours.encode_prompt(prompts), strict=True):
        assert relative_error(got, want) < 1e-5
    frames = jnp.asarray(np.tanh(normal(1, 2, 1, 64, 64, 3)))
    assert relative_error(ours.encode_image(frames), base.encode_image(frames)) < 1e-5


def test_first_frame_of_graphs_equals_the_programs(options, runners):
    from neodragon_jax.generation import first_frame

    host = graph_program.FirstFrameHost.load(options)
    want, got = first_frame.load(TINY_CHECKPOINT, 128, 128), graph_program.first_frame_model(host, runners)
    assert want.latent_size == got.latent_size
    conditions = [model.encode_prompt([PROMPT]) for model in (want, got)]
    for expected, value in zip(*conditions, strict=True):
        assert relative_error(value, expected) < 1e-5
    x, timestep = jnp.asarray(normal(2, 1, *want.latent_size)), jnp.array([749.0])
    noise = [model.denoise(x, timestep, conditions[0]) for model in (want, got)]
    assert relative_error(noise[1], noise[0]) < 1e-5
    assert relative_error(got.decode(x), want.decode(x)) < 1e-5


def test_seven_steps_of_the_decoder_are_the_whole_clip(host, graphs, float_graphs):
    """Streaming through the ONNX graph gives the 49 frames of the whole-clip decoder."""
    latents = normal(3, 1, 7, 8, 8, 16)
    params = graphs['video_decoder'].read()
    decode = jax.jit(lambda clip: host.vae.apply({'params': params}, clip, method='decode'))
    session = OnnxSession(float_graphs['video_decoder'])
    components = graph_program.components(
        host, {'video_decoder': session}, make_components().denoise, make_components()
    )
    memories, chunks = components.init_memories(1, 8, 8), []
    for index in range(7):
        frames, memories = components.decode_step(jnp.asarray(latents[:, index : index + 1]), memories)
        chunks.append(np.asarray(frames))
    streamed = np.concatenate(chunks, axis=1)[:, 7:]
    assert streamed.shape[1] == 49
    assert relative_error(streamed, np.asarray(decode(latents))) < 1e-5


def make_components() -> pipeline.Components:
    """Return components that fail the test if called."""
    never = lambda *_: pytest.fail('not part of this test')
    return pipeline.Components(*[never] * 5, channels=16, patch=2, max_grid=24, max_frames=200)


def test_scaled_residual_is_exact(graphs):
    """Dividing T5's residual stream by a power of two changes no bit of the result."""
    model, params = checkpoint.load(TINY_CHECKPOINT / 'text_encoder_3')
    assert isinstance(model, T5EncoderWithProjection)
    ids = np.arange(5, 133)
    mask = (np.arange(128) < 40).astype(np.int32)
    table = params['encoder']['token_embedding']['embedding']
    run = lambda scale: _dt5_states(model, params, jnp.asarray(table[ids]), jnp.asarray(mask), scale)
    plain, scaled = run(1.0), run(text_graphs.RESIDUAL_SCALE)
    np.testing.assert_array_equal(np.asarray(scaled), np.asarray(plain))
    want = jax.jit(model.apply)({'params': params}, jnp.asarray(ids), jnp.asarray(mask))
    assert relative_error(plain, want) < 1e-5


def _dt5_states(model: Any, params: Any, x: jax.Array, mask: jax.Array, scale: float) -> jax.Array:

    from neodragon_jax.models.t5 import key_bias

    config = dataclasses.replace(model.config, layer_norm_epsilon=model.config.layer_norm_epsilon / scale**2)
    scaled = {**params, 'encoder': text_graphs.scale_residual(params['encoder'], scale)}

    def encode(bound: Any) -> jax.Array:
        bias = bound.encoder.positions(128) + key_bias(mask)
        return bound.project(bound.encoder.transform(x / scale, bias))

    return model.clone(config=config).apply({'params': scaled}, method=encode)


def test_rules_for_ranges(graphs, runners, float_graphs, tmp_path):
    """Percentile and least error exclude an outlier that minmax includes; clipped values get the exact clip range."""
    path, module = float_graphs['super_resolution'], graphs['super_resolution']
    feeds = [make_feeds(module, seed) for seed in range(2)]
    feeds[1]['frame'][0, 0, 0, 0] = 20.0
    widths = {}
    for method in METHODS:
        file = tmp_path / f'{method}.json'
        measure_ranges(path, file, lambda: feeds, quantized_operations(path), method)
        widths[method] = _ranges(file)
    nodes = onnx.load(path).graph.node
    clipped = [node.output[0] for node in nodes if node.op_type == 'Clip']
    assert all(widths[method][name] == (0.0, 1.0) for method in METHODS for name in clipped)
    first = next(node.output[0] for node in nodes if node.op_type == 'Conv')
    highest = {method: widths[method][first][1] for method in METHODS}
    assert highest['percentile'] < highest['minmax'] and highest['mse'] < highest['minmax']


def test_ranges_are_those_of_the_librarys_calibrator(graphs, float_graphs, tmp_path):
    """The range measurement of this project needs less memory but gives the same numbers as ONNX Runtime's."""
    path, module = float_graphs['first_frame_decoder'], graphs['first_frame_decoder']
    feeds, kinds = [make_feeds(module, seed) for seed in range(3)], quantized_operations(path)
    measure_ranges(path, tmp_path / 'ours.json', lambda: feeds, kinds, margin=1.0)

    class Reader(CalibrationDataReader):
        samples = iter(feeds)

        def get_next(self) -> Any:
            return next(self.samples, None)

    calibrator = create_calibrator(path, kinds, augmented_model_path=str(tmp_path / 'augmented.onnx'))
    calibrator.collect_data(Reader())
    want = calibrator.compute_data().items()
    assert _ranges(tmp_path / 'ours.json') == {name: _ends(data.range_value) for name, data in want}
    with pytest.raises(InputError, match='no calibration inputs'):
        measure_ranges(path, tmp_path / 'none.json', list, kinds)


def _ranges(file: pathlib.Path) -> dict[str, tuple[float, ...]]:
    from onnxruntime.quantization.calibrate import load_tensors_data

    data = load_tensors_data(file)
    return {name: _ends(entry.range_value) for name, entry in data.items()}


def _ends(found: Sequence[np.ndarray]) -> tuple[float, ...]:
    return tuple(float(np.ravel(end)[0]) for end in found)


def test_weights_are_doubled_until_the_target_is_met(graphs, runners, float_graphs, tmp_path):
    module, path = graphs['super_resolution'], float_graphs['super_resolution']
    calls = [Call(feeds, runners[module.name].run(feeds)) for feeds in (make_feeds(module, seed) for seed in range(2))]
    destination = tmp_path / 'graph.onnx'
    to_w8a16(path, destination, [call.inputs for call in calls])
    plain = lowest_db(OnnxSession(destination), calls, module.compared)
    ranges = tmp_path / 'ranges.json'
    none, reached = quantize_to_target(path, destination, ranges, calls, module.compared, plain - 5)
    assert not none and reached == pytest.approx(plain)
    assert json.loads((tmp_path / RECIPE).read_text())['groups'] == [], 'nothing had to be measured'
    none, reached = quantize_to_target(path, destination, ranges, calls, module.compared, plain + 3, search=False)
    assert not none and reached == pytest.approx(plain)
    some, reached = quantize_to_target(path, destination, ranges, calls, module.compared, plain + 3)
    assert some and reached >= plain + 3
    recipe = json.loads((tmp_path / RECIPE).read_text())
    chosen = [name for group in recipe['groups'] if group['in_two_parts'] for name in group['weights']]
    assert chosen == some and recipe['plain_db'] == pytest.approx(plain) and recipe['reached_db'] == reached
    others = [group for group in recipe['groups'] if not group['in_two_parts']]
    assert others and all(group['db_if_alone_rounded'] > plain for group in others)
    assert lowest_db(OnnxSession(destination), calls, module.compared) == pytest.approx(reached)
    quantize_to_target(path, destination, ranges, calls[::-1], module.compared, plain + 3)
    assert json.loads((tmp_path / RECIPE).read_text()) == recipe, 'the worst call decides, wherever it is'
    assert not [file for file in path.parent.iterdir() if file.name.startswith('.')]


def test_parameters_are_float32_whatever_type_they_are_stored_in(tmp_path):
    """An embedding table in bfloat16 would give graph inputs of the wrong type."""
    for folder in TINY_CHECKPOINT.iterdir():
        if 'tokenizer' in folder.name:
            shutil.copytree(folder, tmp_path / folder.name)
        elif (folder / 'config.json').is_file():
            module, params = checkpoint.load(folder)
            checkpoint.save(tmp_path / folder.name, module, cast(params, jnp.bfloat16))
    options = modules.ProgramOptions(tmp_path, 'hybrid', make_plan('hybrid', 9, 64, 64), None, None)
    for name, module in modules.phone_modules(options).items():
        assert {leaf.dtype for leaf in jax.tree.leaves(module.read())} == {np.dtype(np.float32)}, name
    ids = np.arange(77) % 5
    assert text_graphs.ClipHost.load(tmp_path / 'text_encoder').embeddings(ids).dtype == np.float32
    t5 = text_graphs.T5Host.load(tmp_path / 'text_encoder_3')
    assert t5.inputs(ids, np.ones(77, np.int32))['embeddings'].dtype == np.float32
