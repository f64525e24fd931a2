"""The bundle that an export writes last: complete, documented, deterministic."""

import errno
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import tomllib

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export.__main__ import main
from export.bundle.contents import Draft, GraphFiles
from export.bundle.host_tables import choose_rows
from export.bundle.meanings import input_meaning, output_meaning
from export.bundle.memory import memory
from export.bundle.readme import memory_line, readme
from export.bundle.writer import MINIMUM_RUNTIME, _graph_entry, name_of
from export.graphs import to_onnx
from export.graphs.runners import Call, OnnxSession
from export.graphs.table import GRAPH_SPECS
from support.goldens import ROOT


@pytest.fixture(scope='module')
def manifest(bundle_folder):
    return json.loads((bundle_folder / 'manifest.json').read_text())


def test_every_file_is_listed_with_its_hash(bundle_folder, manifest):
    found = {str(path.relative_to(bundle_folder)) for path in bundle_folder.rglob('*') if path.is_file()}
    assert found == {*manifest['files'], 'manifest.json', 'manifest.json.sha256'}
    for name, record in manifest['files'].items():
        content = (bundle_folder / name).read_bytes()
        assert record == {'bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest()}, name


def test_graphs_are_hard_links_where_the_disk_has_them(tmp_path, monkeypatch):
    """A second copy on disk would double the space; without hard links the file is copied."""
    source, draft = tmp_path / 'graph.onnx', Draft(tmp_path / 'bundle')
    source.write_bytes(b'graph')
    draft.link(source, 'linked.onnx')
    assert (draft.folder / 'linked.onnx').samefile(source)

    def refuse(*_):
        raise OSError(errno.EXDEV, 'Invalid cross-device link')

    monkeypatch.setattr(os, 'link', refuse)
    draft.link(source, 'copied.onnx')
    assert not (draft.folder / 'copied.onnx').samefile(source)
    assert draft.files['copied.onnx'] == draft.files['linked.onnx']


def save_inline_limit(model: onnx.ModelProto, path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the float export saves more weights than fit into a file."""
    monkeypatch.setattr(to_onnx, 'INLINE_BYTES', 0)
    to_onnx.save(model, path)


def save_two_files(model: onnx.ModelProto, path: pathlib.Path, _: pytest.MonkeyPatch) -> None:
    """As jax2onnx and the quantizer save, but with the weights in two files."""
    for number, tensor in enumerate(model.graph.initializer):
        onnx.external_data_helper.set_external_data(tensor, f'{path.name}.data{number or ""}')
    onnx.save(model, path)


@pytest.mark.parametrize('save', [onnx.save, save_inline_limit, save_two_files])
def test_all_files_of_a_graph_are_in_the_bundle(save, tmp_path, monkeypatch):
    """The graph of the bundle runs without the export's folder, wherever its weights are stored."""
    weights = [numpy_helper.from_array(np.full((64, 64), value, np.float32), f'w{value}') for value in (1, 2)]
    nodes = [helper.make_node('MatMul', ['states', 'w1'], ['x']), helper.make_node('MatMul', ['x', 'w2'], ['text'])]
    sides = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 64]) for name in ('states', 'text')]
    graph = helper.make_graph(nodes, 'context_adapter', sides[:1], sides[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 21)], ir_version=10)
    path = tmp_path / 'export' / 'context_adapter.onnx'
    path.parent.mkdir()
    arguments = (monkeypatch,) if save is not onnx.save else ()
    save(model, path, *arguments)
    feeds = {'states': np.ones((1, 64), np.float32)}
    call = Call(feeds, OnnxSession(path).run(feeds))
    specs = {'inputs': {'states': {'shape': [1, 64], 'dtype': 'float32'}},
             'outputs': {'text': {'shape': [1, 64], 'dtype': 'float32'}}}  # fmt: skip
    draft = Draft(tmp_path / 'bundle')
    entry = _graph_entry(draft, 'context_adapter', GraphFiles('fp16', path, specs, ('text',), 40.0), call)
    assert set(entry['portable']) == {name for name in draft.files if name.startswith('portable/')}
    shutil.rmtree(path.parent)
    outputs = OnnxSession(draft.folder / entry['portable'][0]).run(feeds)
    np.testing.assert_array_equal(outputs['text'], call.outputs['text'])


def test_every_key_is_documented(manifest):
    document = (ROOT / 'docs' / 'bundle.md').read_text()
    for key in manifest:
        assert f'`{key}' in document or f'`{key}.' in document, key


def test_the_bundle_says_that_videos_are_not_checked(bundle_folder, manifest):
    assert manifest['safety'] == {'checkpoint_has_checker': False}
    assert 'the checkpoint has no safety checker' in (bundle_folder / 'README.md').read_text()
    text = readme(manifest | {'safety': {'checkpoint_has_checker': True}})
    assert 'The checkpoint has a safety checker' in text and 'it is not part of the bundle' in text


def test_every_tensor_has_a_source_and_a_meaning(manifest):
    for name, graph in manifest['graphs'].items():
        for tensor, entry in graph['inputs'].items():
            assert (entry['source'], entry['meaning']) == input_meaning(name, tensor)
            producer, _, output = entry['source'].partition('.')
            assert producer in ('host', 'table') or output in manifest['graphs'][producer]['outputs'], tensor
        for tensor, entry in graph['outputs'].items():
            assert entry['meaning'] == output_meaning(name, tensor)


def test_a_binary_tells_the_sdk_that_made_it(bundle_folder, manifest):
    readme = (bundle_folder / 'README.md').read_text()
    for binary in manifest['binaries']:
        metadata = json.loads((bundle_folder.parent / binary['file'].split('/')[1] / 'metadata.json').read_text())
        assert binary['qnn_sdk'] == metadata['tool_versions']['qnn_sdk']
        assert f'QNN SDK {binary["qnn_sdk"]}' in readme


def test_the_lowest_runtime_is_not_the_one_that_made_the_bundle(manifest):
    """A phone's package of ONNX Runtime is often older than the exporter's; recorded calls judge what it computes."""
    assert manifest['minimum_runtime'] == MINIMUM_RUNTIME
    made = {name: manifest['tool_versions'][name] for name in MINIMUM_RUNTIME}
    assert made == {name: importlib.metadata.version(name) for name in MINIMUM_RUNTIME}
    project = tomllib.loads((ROOT / 'export' / 'player' / 'pyproject.toml').read_text())['project']
    packages = (*project['dependencies'], *project['optional-dependencies']['qnn'])
    assert {f'{name}>={version}' for name, version in MINIMUM_RUNTIME.items()} <= set(packages)


def test_phases_hold_every_graph_once(manifest):
    assert sorted(name for phase in manifest['phases'] for name in phase['graphs']) == sorted(manifest['graphs'])
    assert set(manifest['graphs']) <= set(GRAPH_SPECS)


def test_the_memory_plan_counts_the_files_on_disk(bundle_folder, manifest):
    """A phase takes its files and its tensors; the binary that the denoiser's stages share counts once."""
    tensors = {
        name: sum(4 * int(np.prod(entry['shape'])) for kind in ('inputs', 'outputs') for entry in graph[kind].values())
        for name, graph in manifest['graphs'].items()
    }
    size = lambda name: (bundle_folder / name).stat().st_size
    for phase in manifest['phases']:
        fixed = sum(tensors[name] for name in phase['graphs'])
        portable = sum(size(path) for name in phase['graphs'] for path in manifest['graphs'][name]['portable'])
        binaries = {entry['file'] for entry in manifest['binaries'] if {*entry['graphs']} & {*phase['graphs']}}
        assert phase['bytes'] == {'portable': fixed + portable, 'sm8750': fixed + sum(map(size, binaries))}
    largest = max(phase['bytes']['sm8750'] for phase in manifest['phases'])
    assert manifest['memory']['largest']['sm8750']['bytes'] == largest < manifest['memory']['budget'] == 3.5e9


def test_a_phase_above_the_budget_is_named():
    plan = [{'name': name, 'bytes': {'sm8750': size}} for name, size in (('text', 10**9), ('denoising', 4 * 10**9))]
    found = memory(plan)
    assert found['largest'] == {'sm8750': {'phase': 'denoising', 'bytes': 4 * 10**9}}
    assert 'on sm8750 "denoising" with 4,000 MB (ABOVE the budget)' in memory_line(found)


def test_stages_of_the_denoiser_share_a_binary(manifest):
    (shared,) = [binary for binary in manifest['binaries'] if len(binary['graphs']) > 1]
    assert list(shared['graphs']) == ['denoiser_stage0', 'denoiser_stage1', 'denoiser_stage2']
    assert shared['session_options']['ep.share_ep_contexts'] == '1'
    assert len({entry['qnn_graph'] for entry in shared['graphs'].values()}) == 3


def test_the_guide_names_every_graph_and_fills_every_blank(bundle_folder, manifest):
    guide = (bundle_folder / 'README.md').read_text()
    assert all(f'| {name} |' in guide for name in manifest['graphs'])
    assert not re.search(r'\$\{?[a-z]', guide)


def test_padded_rows_replace_those_of_padding_tokens_only():
    valid, padded = np.zeros((1, 5, 2)), np.ones((1, 5, 2))
    chosen = choose_rows(valid, padded, np.array([1, 0, 1]))
    assert chosen[0, :, 0].tolist() == [0, 1, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.xfail(reason='QNN 2.51 orders parts of FP16 binaries of several graphs by addresses in memory')
def test_two_exports_give_the_same_bytes(bundle_folder, bundle_arguments, tmp_path):
    """Everything is made twice, binaries included, in folders of different depth."""
    other = tmp_path / 'a longer' / 'path of another export'
    assert main([*bundle_arguments, '--out', str(other)]) == 0
    names = sorted(str(path.relative_to(bundle_folder)) for path in bundle_folder.rglob('*') if path.is_file())
    assert names == sorted(
        str(path.relative_to(other / 'bundle')) for path in (other / 'bundle').rglob('*') if path.is_file()
    )
    assert any(name.endswith('.bin') and name.startswith('binaries') for name in names)
    different = [
        name for name in names if (bundle_folder / name).read_bytes() != (other / 'bundle' / name).read_bytes()
    ]
    assert not different


@pytest.mark.parametrize(
    ('given', 'name'), [('weights', 'weights'), ('.', 'here'), ('..', 'there'), ('weights/', 'weights')]
)
def test_a_bundle_has_the_name_of_the_checkpoints_folder(tmp_path, monkeypatch, given, name):
    (tmp_path / 'there' / 'here' / 'weights').mkdir(parents=True)
    monkeypatch.chdir(tmp_path / 'there' / 'here')
    assert name_of(given) == name
