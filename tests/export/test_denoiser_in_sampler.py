"""Phone export step by step: the denoiser's graphs in the sampler, precisions, sessions; see test_export_modules.py."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export.graphs.denoiser import SHIPPED, denoiser_graphs
from export.graphs.runners import OnnxSession
from export.graphs.table import FORBIDDEN, PhoneGraph
from export.graphs.text import clip_pooled
from export.graphs.to_onnx import to_onnx
from export.host.denoiser_host import DenoiserHost, GraphDenoiser
from export.host.recording import Recorder
from export.measure.snr import snr_db
from export.qnn.chipsets import find_target
from export.qnn.compile import compile_graph, provider_options
from export.qnn.htp import HtpSession
from export.quantize.qdq import to_fp16, to_w8a16
from neodragon_jax.base.errors import InputError
from neodragon_jax.checkpoint import components as checkpoint
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.pyramid.sampler import DrawnNoise, Plan, Prompt, jax_denoiser, sample
from support.goldens import TINY_CHECKPOINT

UNITS, GRID, TEXT_TOKENS, STAGES = 3, (4, 8), 16, 3
LATENT_GRIDS = ((2, 4), (4, 8), (8, 16))
EXACT_DB = 110.0
# Of graphs that draw frame 0 too.
FORM = dataclasses.replace(SHIPPED, draws_frame_zero=True)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope='module')
def denoiser() -> tuple[PyramidMMDiT, dict[str, Any]]:
    model, params = checkpoint.load(TINY_CHECKPOINT / 'diffusion_transformer_320p')
    assert isinstance(model, PyramidMMDiT)
    return model, params


@pytest.fixture(scope='module')
def exported(denoiser, tmp_path_factory) -> GraphDenoiser:
    """The three stages as ONNX graphs, in the place of the denoiser."""
    folder = tmp_path_factory.mktemp('float')
    graphs = denoiser_graphs(*denoiser, UNITS, GRID, TEXT_TOKENS, STAGES, FORM)
    for graph in graphs:
        to_onnx(graph, folder / f'{graph.name}.onnx')
    return GraphDenoiser(DenoiserHost(*denoiser, FORM), [OnnxSession(folder / f'{g.name}.onnx') for g in graphs])


@pytest.fixture(scope='module')
def tower(tmp_path_factory) -> tuple[PhoneGraph, pathlib.Path]:
    """A text tower as a float ONNX file: small, with norms, attention and linears."""
    graph = clip_pooled('clip_l', TINY_CHECKPOINT / 'text_encoder')
    path = tmp_path_factory.mktemp('tower') / 'graph.onnx'
    to_onnx(graph, path)
    return graph, path


def tower_feeds(graph: PhoneGraph, seed: int) -> dict[str, np.ndarray]:
    feeds = {name: normal(seed, *shape) for name, shape in graph.inputs.items()}
    return feeds | {'end': np.eye(77, dtype=np.float32)[[9]]}


@pytest.fixture(scope='module')
def prompt(denoiser) -> Prompt:
    """Two prompts of different lengths."""
    config = denoiser[0].config
    mask = (np.arange(TEXT_TOKENS) < np.array([[9], [16]])).astype(np.int32)
    return Prompt(*map(jnp.asarray, (normal(1, 2, TEXT_TOKENS, config.width), mask, normal(2, 2, 48))))


def call_inputs(stage: int, unit: int, seed: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Return front-padded history, noisy latent and unit of one denoiser call."""
    stages = [max(stage - distance + 1, 0) for distance in range(UNITS, 0, -1)]
    history = [normal(seed + i, 1, 1, *LATENT_GRIDS[level], 16) for i, level in enumerate(stages)]
    for padding in history[: UNITS - unit]:
        padding[:] = 0
    return history, normal(seed + 9, 1, 1, *LATENT_GRIDS[stage], 16), np.array([unit], np.int32)


def arguments(inputs: Any, prompt: Prompt, timestep: float) -> tuple[Any, ...]:
    """Return what a denoiser takes after the stage."""
    return (*jax.tree.map(jnp.asarray, inputs), Prompt(*(field[:1] for field in prompt)), jnp.array([timestep]))


def test_padding_garbage_does_not_reach_the_flow(exported, prompt):
    stage = 2
    inputs = call_inputs(stage, unit=1, seed=5)
    history = inputs[0]
    run = lambda: np.asarray(exported(stage, *arguments(inputs, prompt, 500.0)))
    clean = run()
    for padding in history[: UNITS - 1]:
        padding[:] = 1e3 * normal(8, *padding.shape)
    np.testing.assert_array_equal(run(), clean)
    history[-1][:] = 1e3 * normal(8, *history[-1].shape)  # no padding: this does matter
    assert snr_db(clean, run()) < 60


def test_sampler_runs_on_graphs(denoiser, exported, prompt):
    """The same program, a batch of two, with guidance: four examples per call go through graphs of batch one."""
    model, params = denoiser
    plan = Plan(frames=UNITS + 1, height=8, width=16, steps=(1, 2, 1), guidance=3.0, first_guidance=2.0)
    noise = DrawnNoise(jax.random.split(jax.random.key(0), 2))
    negative = jax.tree.map(lambda field: field[::-1], prompt)
    want, got = (sample(f, plan, prompt, noise, negative) for f in (jax_denoiser(model.apply, params), exported))
    assert snr_db(np.asarray(want), np.asarray(got)) > 90


def test_masks_are_finite(denoiser, prompt):
    feeds = DenoiserHost(*denoiser, FORM).stage_inputs(*arguments(call_inputs(2, 1, 0), prompt, 1.0))
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in feeds.values())
    assert min(float(array.min()) for name, array in feeds.items() if name.startswith('bias')) >= FORBIDDEN


def test_host_work_in_a_graph_is_refused(tmp_path):
    graph = PhoneGraph('denoiser_stage0', lambda _, x: jnp.where(x > 0, x, 0.0), {'x': (4, 4)}, ('y',))
    with pytest.raises(InputError, match='Where'):
        to_onnx(graph, tmp_path / 'graph.onnx')


def test_fp16_form_is_the_same_function(tmp_path):
    """Also with weights in a file beside the graph, as the full-size model has them."""
    scale = normal(1, 128)

    def norm(x: jax.Array) -> Any:
        return nn.RMSNorm(epsilon=1e-6, parent=None).apply({'params': {'scale': scale}}, x.reshape(6, 4, 128))

    plain, source, destination = tmp_path / 'plain.onnx', tmp_path / 'source.onnx', tmp_path / 'half' / 'graph.onnx'
    destination.parent.mkdir()
    to_onnx(PhoneGraph('any', lambda _, x: norm(x), {'x': (6, 512)}, ('y',)), plain)
    onnx.save(onnx.load(plain), source, save_as_external_data=True, location='source.data', size_threshold=256)
    to_fp16(source, destination)
    feeds = {'x': normal(0, 6, 512)}
    want, got = (OnnxSession(path).run(feeds)['y'] for path in (plain, destination))
    assert snr_db(want, got) > EXACT_DB
    graph = onnx.shape_inference.infer_shapes(onnx.load(destination)).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    assert {ranks[node.input[0]] for node in graph.node if node.op_type == 'RMSNormalization'} == {2}


@pytest.mark.qnn
def test_silu_of_a_vector_in_fp16(tmp_path):
    """Where all results are small, after the large negative numbers of a trained embedding of the timestep."""
    source, half, x = tmp_path / 'silu.onnx', tmp_path / 'half.onnx', np.linspace(-12, -3, 96, dtype=np.float32)[None]
    to_onnx(PhoneGraph('any', lambda _, x: nn.silu(x), {'x': (1, 96)}, ('y',)), source)
    to_fp16(source, half)
    want = OnnxSession(source).run({'x': x})['y']
    assert snr_db(want, OnnxSession(half).run({'x': x})['y']) > 60  # exact above -11
    reached = {}
    for path in (source, half):
        with HtpSession(path, provider_options(find_target('sm8750'), 'fp16')) as session:
            reached[path] = snr_db(want, session.run({'x': x})['y'])
    assert reached[half] > 45 and reached[source] < 35


def test_w8a16_types_and_ranges(tower, tmp_path):
    graph, source = tower
    feeds = [tower_feeds(graph, seed) for seed in range(3)]
    path = tmp_path / 'graph.onnx'
    to_w8a16(source, path, iter(feeds), margin=2.0)
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}

    def quantized_with(value: str) -> tuple[np.ndarray, np.ndarray]:
        node = producers[value]
        assert node.op_type == 'DequantizeLinear'
        return constants[node.input[1]], constants[node.input[2]]

    for node in graph.node:
        if node.op_type == 'MatMul':
            assert [quantized_with(name)[1].dtype for name in node.input] == [np.uint16, np.int16]
        if node.op_type == 'Gemm':
            scale, zero = quantized_with(node.input[1])
            assert zero.dtype == np.int8 and scale.shape == constants[producers[node.input[1]].input[0]].shape[-1:]
    scale, zero = next(
        (constants[node.input[1]], constants[node.input[2]])
        for node in graph.node
        if node.op_type == 'QuantizeLinear' and node.input[0] == 'embeddings'
    )
    highest = max(float(feed['embeddings'].max()) for feed in feeds)
    assert (65535 - int(zero)) * float(scale) == pytest.approx(2 * highest, rel=1e-3)


def test_recorder_is_transparent_and_keeps_every_example(denoiser, prompt):
    model, params = denoiser
    recorder = Recorder(jax_denoiser(model.apply, params))
    plan = Plan(frames=2, height=8, width=16, steps=(1, 1, 2), first_steps=(2, 1, 1))
    noise = DrawnNoise(jax.random.split(jax.random.key(3), 2))
    got = sample(recorder, plan, prompt, noise)
    np.testing.assert_array_equal(
        np.asarray(got), np.asarray(sample(jax_denoiser(model.apply, params), plan, prompt, noise))
    )
    assert {stage: len(calls) for stage, calls in recorder.samples.items()} == {0: 6, 1: 4, 2: 6}
    assert [int(call.unit[0]) for call in recorder.samples[0]] == [0, 0, 0, 0, 1, 1]
    call = recorder.samples[2][-1]
    assert call.x.shape == call.flow.shape == (1, 1, 8, 16, 16)
    np.testing.assert_array_equal(call.prompt.text, prompt.text[1:])


def test_snr():
    reference = np.array([3.0, 4.0])
    assert snr_db(reference, 1.1 * reference) == pytest.approx(20)
    assert snr_db(reference, reference) == 300
    assert snr_db(reference, np.array([np.nan, 4.0])) == -300


def test_chipsets():
    assert find_target('SM8750') == find_target('sm8750')
    assert provider_options(find_target('sm8650'), 'w8a16') == {'soc_model': '57', 'htp_arch': '75'}
    with pytest.raises(InputError, match=r'Did you mean "sm8650"\?.*Snapdragon X Elite'):
        find_target('sm8651')


def make_model(path: pathlib.Path, *kinds: str) -> None:
    """Write a graph of operations in a row on a square matrix."""
    names = ['x', *(f'after_{kind}' for kind in kinds)]
    nodes = [
        helper.make_node(kind, names[i : i + 1], names[i + 1 : i + 2], name=f'my_{kind}')
        for i, kind in enumerate(kinds)
    ]
    x, y = helper.make_tensor_value_info('x', 1, [8, 8]), helper.make_tensor_value_info(names[-1], 1, None)
    graph = helper.make_graph(nodes, 'graph', [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10), path)


@pytest.mark.qnn
def test_failed_compile_leaves_nothing(tmp_path):
    make_model(tmp_path / 'model.onnx', 'Relu', 'Det')
    with pytest.raises(InputError, match='my_Det, type: Det') as failure:
        compile_graph('det', tmp_path / 'model.onnx', tmp_path / 'out', find_target('sm8750'), 'fp16', {})
    assert '\n' not in str(failure.value)
    assert [path.name for path in tmp_path.iterdir()] == ['model.onnx']


@pytest.mark.qnn
def test_dead_session_is_an_error_not_a_hang(tmp_path):
    make_model(tmp_path / 'model.onnx', 'Relu')
    with HtpSession(tmp_path / 'model.onnx', provider_options(find_target('sm8750'), 'fp16')) as session:
        x = normal(0, 8, 8)
        assert snr_db(np.maximum(x, 0), session.run({'x': x})['after_Relu']) > 60
        with pytest.raises(InputError, match='x'):
            session.run({'x': normal(0, 3, 3)})
    with HtpSession(tmp_path / 'model.onnx', provider_options(find_target('sm8750'), 'fp16')) as session:
        session._process.kill()
        with pytest.raises(InputError, match='SIGKILL'):
            session.run({'x': x})
