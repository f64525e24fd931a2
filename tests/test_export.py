"""Phone export: the ONNX graphs against JAX, and W8A16 and FP16 binaries on the HTP simulator against both."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from conftest import TINY_CHECKPOINT
from onnx import helper, numpy_helper

from export.__main__ import main
from export.build import export_graph
from export.calibration import Recorder, spread, videos_needed
from export.compile_qnn import compile_graph, find_target, provider_options
from export.graphs import FORBIDDEN, DenoiserHost, Graph, denoiser_graphs
from export.htp import HtpSession
from export.quantize import to_fp16, to_w8a16
from export.report import Report, Row, snr_db
from export.runtime import GraphDenoiser, OnnxSession
from export.to_onnx import to_onnx
from neodragon_jax import checkpoint, pipeline
from neodragon_jax.errors import InputError
from neodragon_jax.models.mmdit import PyramidMMDiT
from neodragon_jax.sampler import DrawnNoise, Plan, Prompt, jax_denoiser, sample

UNITS, GRID, TEXT_TOKENS, STAGES = 3, (4, 8), 16, 3
LATENT_GRIDS = ((2, 4), (4, 8), (8, 16))
EXACT_DB = 110.0
AIM_DB = 35.0
SETTINGS = ['--height', '64', '--width', '128', '--frames', '17', '--calibration-samples', '6']


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope='module')
def denoiser() -> tuple[PyramidMMDiT, dict[str, Any]]:
    model, params = checkpoint.load(TINY_CHECKPOINT / 'diffusion_transformer_320p')
    assert isinstance(model, PyramidMMDiT)
    return model, params


@pytest.fixture(scope='module')
def graphs(denoiser) -> list[Graph]:
    return denoiser_graphs(*denoiser, UNITS, GRID, TEXT_TOKENS, STAGES)


@pytest.fixture(scope='module')
def float_graphs(graphs, tmp_path_factory) -> list[pathlib.Path]:
    """The three stages as float ONNX files."""
    folder = tmp_path_factory.mktemp('float')
    paths = [folder / f'{graph.name}.onnx' for graph in graphs]
    for graph, path in zip(graphs, paths, strict=True):
        to_onnx(graph, path)
    return paths


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


@pytest.mark.parametrize('stage', range(STAGES))
def test_onnx_equals_the_whole_model(stage, denoiser, float_graphs, prompt):
    """Host half and graph together compute what training's fused call computes, for every unit of the envelope."""
    model, params = denoiser
    reference = jax_denoiser(model.apply, params)
    exported = GraphDenoiser(DenoiserHost(model, params), [OnnxSession(path) for path in float_graphs])
    for unit in range(UNITS + 1):
        call = (stage, *arguments(call_inputs(stage, unit, seed=unit), prompt, 700.0))
        assert snr_db(np.asarray(reference(*call)), np.asarray(exported(*call))) > EXACT_DB


@pytest.mark.parametrize('stage', range(STAGES))
def test_padding_garbage_does_not_reach_the_flow(stage, denoiser, float_graphs, prompt):
    exported = GraphDenoiser(DenoiserHost(*denoiser), [OnnxSession(path) for path in float_graphs])
    inputs = call_inputs(stage, unit=1, seed=5)
    history = inputs[0]
    run = lambda: np.asarray(exported(stage, *arguments(inputs, prompt, 500.0)))
    clean = run()
    for padding in history[: UNITS - 1]:
        padding[:] = 1e3 * normal(8, *padding.shape)
    np.testing.assert_array_equal(run(), clean)
    history[-1][:] = 1e3 * normal(8, *history[-1].shape)  # no padding: this does matter
    assert snr_db(clean, run()) < 60


def test_sampler_runs_on_graphs(denoiser, float_graphs, prompt):
    """The same program, a batch of two, with guidance: four examples per call go through graphs of batch one."""
    model, params = denoiser
    plan = Plan(frames=UNITS + 1, height=8, width=16, steps=(1, 2, 1), guidance=3.0, first_guidance=2.0)
    noise = DrawnNoise(jax.random.split(jax.random.key(0), 2))
    exported = GraphDenoiser(DenoiserHost(model, params), [OnnxSession(path) for path in float_graphs])
    negative = jax.tree.map(lambda field: field[::-1], prompt)
    want, got = (sample(f, plan, prompt, noise, negative) for f in (jax_denoiser(model.apply, params), exported))
    assert snr_db(np.asarray(want), np.asarray(got)) > 90


def test_graph_is_native_and_lean(denoiser, graphs, float_graphs):
    """One node per norm, linear and activation; what the last block does not need is not there."""
    blocks = denoiser[0].config.num_layers
    for graph, path in zip(graphs, float_graphs, strict=True):
        model = onnx.load(path)
        onnx.checker.check_model(model)
        counts = {
            kind: sum(node.op_type == kind for node in model.graph.node) for kind in ('Gemm', 'MatMul', 'Softmax')
        }
        # Per block 6 projections and 3 more per stream; the last lacks text's query and its 3. Embedding, head.
        assert counts == {'Gemm': 12 * blocks - 4 + 2, 'MatMul': 2 * blocks, 'Softmax': blocks}
        kinds = {node.op_type for node in model.graph.node}
        assert {'LayerNormalization', 'RMSNormalization', 'Gelu'} <= kinds
        assert not kinds & {
            'Gather',
            'Where',
            'Shape',
            'Expand',
            'ReduceMean',
            'Sqrt',
            'Erf',
            'Tanh',
            'ConstantOfShape',
        }
        assert [value.name for value in model.graph.input] == list(graph.inputs)
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        scalars = [
            node for node in model.graph.node for name in node.input if name in constants and not constants[name].dims
        ]
        assert not scalars, 'the factor 1/sqrt(K) belongs in the gains of the query norms'


def test_inputs_are_named_and_finite(denoiser, graphs, prompt):
    feeds = DenoiserHost(*denoiser).stage_inputs(*arguments(call_inputs(2, 1, 0), prompt, 1.0))
    assert {name: array.shape for name, array in feeds.items()} == dict(graphs[2].inputs)
    assert 'blocks.0.text.gate_mlp' in feeds and 'last_block.text.gain' in feeds
    assert all(array.dtype == np.float32 for array in feeds.values())
    assert set(np.unique(feeds['bias'])) == {np.float32(FORBIDDEN), np.float32(0)}


def test_host_work_in_a_graph_is_refused(tmp_path):
    graph = Graph('denoiser_stage0', lambda x: jnp.where(x > 0, x, 0.0), {'x': (4, 4)}, 'y')
    with pytest.raises(InputError, match='Where'):
        to_onnx(graph, tmp_path / 'graph.onnx')


def test_fp16_form_is_the_same_function(graphs, float_graphs, tmp_path):
    """Also with weights in a file beside the graph, as the full-size model has them."""
    source, destination = tmp_path / 'source.onnx', tmp_path / 'half' / 'graph.onnx'
    destination.parent.mkdir()
    onnx.save(
        onnx.load(float_graphs[1]), source, save_as_external_data=True, location='source.data', size_threshold=256
    )
    to_fp16(source, destination)
    feeds = {name: normal(i, *shape) for i, (name, shape) in enumerate(graphs[1].inputs.items())}
    want, got = (OnnxSession(path).run(feeds)['flow'] for path in (float_graphs[1], destination))
    assert snr_db(want, got) > EXACT_DB
    graph = onnx.shape_inference.infer_shapes(onnx.load(destination)).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    assert {ranks[node.input[0]] for node in graph.node if node.op_type == 'RMSNormalization'} == {2}


def test_w8a16_types_and_ranges(denoiser, graphs, float_graphs, prompt, tmp_path):
    host = DenoiserHost(*denoiser)
    feeds = [host.stage_inputs(*arguments(call_inputs(0, unit, unit), prompt, 900.0)) for unit in range(UNITS)]
    path = tmp_path / 'graph.onnx'
    to_w8a16(float_graphs[0], path, iter(feeds), margin=2.0)
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}

    def quantised_with(value: str) -> tuple[np.ndarray, np.ndarray]:
        node = producers[value]
        assert node.op_type == 'DequantizeLinear'
        return constants[node.input[1]], constants[node.input[2]]

    for node in graph.node:
        if node.op_type == 'MatMul':
            assert [quantised_with(name)[1].dtype for name in node.input] == [np.uint16, np.int16]
        if node.op_type == 'Gemm':
            scale, zero = quantised_with(node.input[1])
            assert zero.dtype == np.int8 and scale.shape == constants[producers[node.input[1]].input[0]].shape[-1:]
    scale, zero = next(
        (constants[node.input[1]], constants[node.input[2]])
        for node in graph.node
        if node.op_type == 'QuantizeLinear' and node.input[0] == 'patches'
    )
    highest = max(float(feed['patches'].max()) for feed in feeds)
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


def test_counting_videos():
    hybrid = pipeline.make_plan('hybrid', 49, 64, 128)
    assert videos_needed(hybrid, [300, 300, 300], first_frame=True) == 1 + 50
    assert videos_needed(hybrid, [0, 0, 0], first_frame=True) == 1
    guided = pipeline.make_plan('monolithic', 17, 64, 128, steps=(2, 1, 1))
    assert videos_needed(guided, [12, 12, 12], first_frame=False) == 1 + 2
    assert spread(list(range(10)), 3) == [0, 4, 9]  # pyright: ignore[reportArgumentType]
    assert spread(list(range(2)), 3) == [0, 1]  # pyright: ignore[reportArgumentType]


def test_snr():
    reference = np.array([3.0, 4.0])
    assert snr_db(reference, 1.1 * reference) == pytest.approx(20)
    assert snr_db(reference, reference) == 300
    assert snr_db(reference, np.array([np.nan, 4.0])) == -300


def make_row(htp_db: float | None) -> Row:
    return Row('denoiser_stage0', 'w8a16', True, 142, 29.0, 130.0, 40.0, htp_db, 0.4, 0.5, 0.2)


def test_exit_status_is_the_verdict(monkeypatch, tmp_path, capsys):
    good, bad = (Report([make_row(db)], [], {}) for db in (31.0, 28.9))
    command = ['--checkpoint', 'c', '--out', str(tmp_path)]
    monkeypatch.setattr('export.__main__.run', lambda args: good)
    assert main(command) == 0
    monkeypatch.setattr('export.__main__.run', lambda args: bad)
    assert main(command) == 1
    assert 'denoiser_stage0 in w8a16: 28.9 dB, target 29 dB' in capsys.readouterr().err
    assert main([*command, '--allow-below-target']) == 0
    assert make_row(None).deploy_db == 40.0


@pytest.mark.parametrize(
    ('arguments', 'complaint'),
    [
        (['--soc', 'sm875'], 'Did you mean "sm8750"?'),
        (['--precision', 'w8a6'], 'Did you mean "w8a16"?'),
        (['--precision', ','], '--precision is empty'),
        (['--prompts-file', 'missing.txt'], 'missing.txt: no such file'),
        (['--evaluation-samples', '0'], '--evaluation-samples is 0'),
        (['--frames', '20'], 'use 8 n + 1'),
        (['--denoiser', 'missing'], 'missing: no such folder'),
        (['--denoiser', str(TINY_CHECKPOINT / 'context_adapter')], 'holds a ContextAdapter'),
    ],
)
def test_wrong_input_is_one_line(arguments, complaint, tmp_path, capsys):
    assert main(['--checkpoint', str(TINY_CHECKPOINT), '--out', str(tmp_path / 'out'), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and complaint in line
    assert not (tmp_path / 'out').exists()


@pytest.fixture(scope='module')
def exported(tmp_path_factory) -> pathlib.Path:
    """The output of the command line on the miniature checkpoint."""
    out = tmp_path_factory.mktemp('export')
    assert main(['--checkpoint', str(TINY_CHECKPOINT), '--out', str(out), *SETTINGS]) == 0
    return out


@pytest.mark.qnn
def test_binaries_on_the_simulator_meet_the_targets(exported):
    """On calls that calibration did not see, of the real sampler, with nothing falling back to the CPU."""
    report = json.loads((exported / 'report.json').read_text())
    rows = {(row['graph'], row['precision']): row for row in report['graphs']}
    assert len(rows) == STAGES * 2
    for (_, precision), row in rows.items():
        assert row['met'] and row['htp_db'] > max(AIM_DB, row['target_db'])
        assert row['onnx_db'] > EXACT_DB
        assert row['ships'] == (precision == 'w8a16')
        if precision == 'w8a16':
            assert abs(row['htp_db'] - row['quantised_db']) < 1
    (video,) = report['videos']
    assert video['latents_db'] > AIM_DB
    assert '| denoiser_stage2 | w8a16 * |' in (exported / 'report.md').read_text()


@pytest.mark.qnn
def test_binary_folder_is_complete(exported):
    folder = exported / 'denoiser_stage2-qnn-w8a16-sm8750'
    metadata = json.loads((folder / 'metadata.json').read_text())
    assert {path.name for path in folder.iterdir()} == {*metadata['model_files'], 'metadata.json'}
    assert metadata['chipset'] == {
        'chipset': 'sm8750',
        'soc_model': 69,
        'htp_arch': 79,
        'product': 'Snapdragon 8 Elite',
    }
    patches = metadata['inputs']['patches']
    assert patches['shape'][1] == 64 and patches['quantised_inside_to']['type'] == 'uint16'
    assert metadata['tool_versions']['qnn_sdk'].startswith('v')
    assert len(metadata['source']['checkpoint_sha256']) == 64
    assert not [path for path in exported.iterdir() if path.name.startswith('.')]


def test_chipsets():
    assert find_target('SM8750') == find_target('sm8750')
    assert provider_options(find_target('sm8650'), 'w8a16') == {'soc_model': '57', 'htp_arch': '75'}
    with pytest.raises(InputError, match=r'Did you mean "sm8650"\?.*Snapdragon X Elite'):
        find_target('sm8651')


@pytest.mark.qnn
def test_finished_steps_are_kept(exported, graphs, tmp_path):
    def build(source: dict[str, Any]) -> dict[pathlib.Path, int]:
        export_graph(graphs[0], tmp_path, find_target('sm8550'), ['fp16'], list, source, lambda text: None)
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*') if path.is_file()}

    before = build({'checkpoint': 1})
    assert build({'checkpoint': 1}) == before
    after = build({'checkpoint': 2})
    assert set(after) == set(before) and not set(after.values()) & set(before.values())
    # Made for another chipset than the one of the command line, so the options do reach the compiler.
    ours = exported / 'denoiser_stage0-qnn-fp16-sm8750' / 'denoiser_stage0_qnn.bin'
    assert (tmp_path / 'denoiser_stage0-qnn-fp16-sm8550' / ours.name).read_bytes() != ours.read_bytes()


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
